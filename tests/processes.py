"""Child processes under a guard that notices a hang and forgives a slow machine."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil

LEAST, WITHIN = 2.0, 180.0  # seconds of CPU time and of the clock; torchrun over two idle ranks: 0.7
MOST = 3600.0  # seconds of CPU time
EVERY = 5.0  # seconds of the clock between two looks


class Hung(AssertionError):
    """A process tree that does nothing, or goes on for ever."""


class Guard:
    """Over ``pid`` and its descendants. On a busy machine work is slow, but it does get CPU time; a deadlock gets none.

    Args:
        most: CPU seconds after which the tree is taken to go round in circles.
    """

    def __init__(self, pid: int, *, most: float | None = None) -> None:
        self._root, self._most = psutil.Process(pid), MOST if most is None else most
        self._used, self._since = 0.0, time.monotonic()
        self._next = self._since + EVERY

    def check(self) -> None:
        """Call it again and again. Raises Hung, after killing the tree."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        used = 0.0
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                used += sum(process.cpu_times()[:4])  # its own and that of the children it has waited for
        if abs(used - self._used) > LEAST:  # less if a part of the tree was orphaned
            self._used, self._since = used, time.monotonic()
        waited = time.monotonic() - self._since
        if waited > WITHIN or used > self._most:
            self.kill()
            raise Hung(f"{used:.0f} s of CPU time, of which less than {LEAST} in the last {waited:.0f} s")

    def kill(self) -> None:
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def run(command: Sequence[str], *, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` with its text captured. Raises Hung, with what was printed, instead of waiting for ever."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options) as process:
        guard, given = Guard(process.pid), stdin or None
        while True:
            try:
                out, err = process.communicate(given, timeout=EVERY)
                return subprocess.CompletedProcess(command, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                given = None  # what was given first is still being sent
            try:
                guard.check()
            except Hung as hung:
                out, err = process.communicate(timeout=60.0)
                raise Hung(f"{hung}:\n{out[-3000:]}{err[-6000:]}") from None
            except BaseException:
                guard.kill()
                raise
