"""Seconds and peak memory of an optimizer step, and the rate of a machine. Needs PyTorch and transformers alone."""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

Data = TypeVar("Data")
PHASES = ("forward", "mi", "backward", "optimizer")


class Clock:
    """Seconds by phase; the device is waited for, so that a phase pays for its own work."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds[phase] += time.perf_counter() - start


class Memory:
    """Peak bytes above what was there when it was made: of the GPU's allocator, or of this process on a CPU."""

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but not given back would hide part of the peak
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
            self.before = _status("VmRSS")

    def peak(self) -> int:
        now = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")
        return now - self.before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measured(step: Callable[[Data, Clock], Any], data: Data, *, warm_up: Data, repeats: int) -> dict[str, Any]:
    """Seconds by phase of each step, and the peak memory of all above what stays between them."""
    step(warm_up, Clock())
    memory, seconds = Memory(), []
    for _ in range(repeats):
        clock = Clock()
        step(data, clock)
        seconds.append(dict(clock.seconds))
    return {"seconds": seconds, "peak": memory.peak()}


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build_model(spec: str, *, attention: str, checkpointing: bool, device: torch.device) -> nn.Module:
    """A causal LM in float32, ready for training: a folder's, or of random weights with the sizes that JSON gives."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if spec.startswith("{"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**json.loads(spec))
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_pretrained(spec, dtype=torch.float32, attn_implementation=attention)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).train()


def matmul_peak(device: torch.device) -> float:
    """FLOP/s of the fastest bf16 product of square matrices of 2048 to 4096 rows."""
    best = 0.0
    for n in (2048, 3072, 4096):
        a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
        a @ b
        for _ in range(5):
            synchronize()
            start = time.perf_counter()
            a @ b
            synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best
