"""What a phase of a step costs: seconds, and the device's memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_device_peak = 0  # of this process, like the operating system's own peak of main memory


class Clock:
    """Seconds by phase; the device is waited for, so that a phase pays for its own work, and its memory looked at."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                note_device_memory()
            self.seconds[phase] += time.perf_counter() - start


def note_device_memory() -> None:
    """At the end of a phase: how much of the GPU is taken now.

    What a phase needed, PyTorch still has then. Its own count of the peak would hold vLLM's pool, too, while that
    sleeps and its memory belongs to the update.
    """
    global _device_peak
    free, total = torch.cuda.mem_get_info()
    _device_peak = max(_device_peak, total - free)


def device_peak() -> int:
    """The most that was taken of the GPU at the end of any phase, in bytes: this process's and any other's on it."""
    note_device_memory()
    return _device_peak
