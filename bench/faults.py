"""Runs of the tiny model that are disturbed from outside, for bench/soak.py.

A run is ``train.py`` in a process that is forked from one which has the libraries loaded, so that it takes seconds.
Some functions are wrapped in the fork, not in the code: they tell through a pipe when they begin and end, so that a
disturbance can be aimed at a phase and is known to have landed in it.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import psutil
from tqdm.std import TqdmDefaultWriteLock

ROOT = Path(__file__).resolve().parents[1]
PHASES = {
    "labelling": [("aipo.run", "", "label")],
    "validation": [("aipo.evaluation.scoring", "Validator", "validate")],
    "sync": [("aipo.rollout.hf", "HfEngine", "sync")],
    "saving": [("aipo.record.checkpoints", "CheckpointStore", "save")],
    "plotting": [("aipo.record.tracker", "Tracker", "draw")],
    "wandb": [("aipo.record.tracker", "_Wandb", "_init"), ("aipo.record.tracker", "_Wandb", "close")],
    "export": [("aipo.run", "", "save_final_model")],
}
SLOW = 900.0  # seconds after which a run hangs
KEYS = (
    "rollout.engine=hf", "model.dtype=float32", "reward.workers=1", "rollout.check_sync=false", "optim.steps=6",
    "validation.every=2", "checkpoint.every=2", "tracking.plot_every=2", "tracking.wandb=offline",
    "reward.correctness=0.5", "reward.length=0.5", "reward.overlong_buffer=15",  # a random model is seldom right
)  # fmt: skip
Inside = Callable[[], None]


def load() -> None:
    """The libraries, in the process that forks. It must have one thread only."""
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    for name in ("torch", "transformers", "deepspeed", "aipo.run", "aipo.rollout.hf", "matplotlib.pyplot"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def in_child(action: Callable[[], Any]) -> Any:
    """What an action gives that a forked process takes, so that this one keeps to one thread."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(theirs, json.dumps(action()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        given = pipe.read()
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError("what a forked process was to do failed")
    return json.loads(given)


@dataclass
class Run:
    """A run that is going on: one process a rank."""

    pids: list[int]
    told: int  # end of the pipe
    began: float
    phases: Counter[str] = field(default_factory=Counter)  # entered so far
    open: list[str] = field(default_factory=list)  # begun and not ended
    spans: list[tuple[str, float]] = field(default_factory=list)  # phase, seconds
    codes: dict[int, int] = field(default_factory=dict)
    hung: str = ""  # where, if it did
    _rest: bytes = b""

    def listen(self, seconds: float) -> bool:
        """Take in what the run tells within some time, at most one piece; False where it has ended."""
        if not select.select([self.told], [], [], max(seconds, 0.0))[0]:
            return True
        piece = os.read(self.told, 65536)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            sign, name, seconds_in = line.decode().split()
            if sign == "+":
                self.phases[name] += 1
                self.open.append(name)
            else:
                self.open.remove(name)
                self.spans.append((name, float(seconds_in)))
        return bool(piece)

    def until(self, phase: str, entry: int) -> bool:
        """Wait for the ``entry``-th begin of a phase; False if the run ended before."""
        while self.phases[phase] < entry:
            if not self.listen(1.0):
                return False
            self._overdue()
        return True

    def wait(self, seconds: float) -> bool:
        """Let it go on for a time; False if it ended within."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not self.listen(left):
                return False
        return True

    def finish(self) -> int:
        """To its end; the exit code that is worst among ranks."""
        while self.listen(1.0):
            self._overdue()
        return self.reap()

    def reap(self) -> int:
        for pid in self.pids:
            if pid not in self.codes:
                self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(OSError):
            os.close(self.told)
        return max(self.codes.values(), key=abs)

    def strike(self, number: int, rank: int = 0) -> tuple[list[str], list[str]]:
        """Send a signal to one rank and wait for the end of all; phases it landed in, and processes left behind."""
        children = [child for pid in self.pids for child in _descendants(pid)]
        while select.select([self.told], [], [], 0)[0] and self.listen(0.0):
            pass
        where = list(self.open)
        os.kill(self.pids[rank], number)
        self.finish()
        _, left = psutil.wait_procs(children, timeout=20)
        return where, [_title(process) for process in left]

    def _overdue(self) -> None:
        """End a run that hangs, once it has written the stacks of its threads into its log."""
        if self.hung or time.monotonic() - self.began < SLOW:
            return
        self.hung = f"hung in {' and '.join(self.open) or 'no phase'}: the log has the stacks"
        for number in (signal.SIGUSR1, signal.SIGKILL):
            for pid in self.pids:
                os.kill(pid, number)
            time.sleep(2)


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()[:4])
    return str(process.pid)


def start(
    arguments: Sequence[str],
    log: Path,
    *,
    cache: Path,
    ranks: int = 1,
    inside: Inside = lambda: None,
    environment: Mapping[str, str] = {},
) -> Run:
    """Fork a run. ``inside`` is called in each rank before it begins: what is to be wrong there."""
    if psutil.Process().num_threads() > 1:  # what a thread holds at a fork is held in the child for ever
        raise RuntimeError(f"not the one thread that may fork; of Python's there are {threading.enumerate()}")
    if hasattr(TqdmDefaultWriteLock, "mp_lock"):  # a semaphore: a run killed while it draws holds it for all later ones
        raise RuntimeError("a progress bar was drawn in the process that forks: its lock is shared with all runs")
    ours, theirs = os.pipe()
    port = _free_port()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            _child(arguments, log, cache, (rank, ranks, port), theirs, inside, environment)
        pids.append(pid)
    os.close(theirs)
    return Run(pids, ours, time.monotonic())


def _child(
    arguments: Sequence[str],
    log: Path,
    cache: Path,
    place: tuple[int, int, int],
    pipe: int,
    inside: Inside,
    environment: Mapping[str, str],
) -> None:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        faulthandler.register(signal.SIGUSR1)
        os.set_inheritable(pipe, False)
        rank, ranks, port = place
        os.chdir(ROOT)
        os.environ |= {"AIPO_CACHE": str(cache), **environment}
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if rank == 0:
            for phase, places in PHASES.items():
                for module, owner, name in places:
                    _tell(phase, module, owner, name, pipe)
        import aipo.run

        aipo.run.LABEL_BLOCK = {"cpu": 4, "cuda": 4}  # several blocks
        inside()
        sys.argv = ["train.py", *arguments]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(phase: str, module: str, owner: str, name: str, pipe: int) -> None:
    place: Any = importlib.import_module(module)
    place = getattr(place, owner) if owner else place
    function = getattr(place, name)

    @wraps(function)
    def told(*arguments: Any, **options: Any) -> Any:
        os.write(pipe, f"+ {phase} 0\n".encode())
        began = time.monotonic()
        try:
            return function(*arguments, **options)
        finally:
            os.write(pipe, f"- {phase} {time.monotonic() - began}\n".encode())

    setattr(place, name, told)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def small_disk(place: Path, megabytes: int = 64) -> Iterator[Path]:
    """A tmpfs, which root may mount."""
    place.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def fill(place: Path, *, keep: int) -> None:
    """Write until nothing goes in any more, then give back ``keep`` bytes."""
    path = place / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            pass
        file.truncate(max(file.tell() - keep, 0))


def jumping_clock(seed: int) -> Inside:
    """Python's ``time.time`` jumps by up to a day, forward and back, at every call; the kernel's clock is as it was."""

    def install() -> None:
        draw, usual = random.Random(seed), time.time
        time.time = lambda: usual() + draw.uniform(-86400, 86400)  # type: ignore[assignment]
        time.time_ns = lambda: int(time.time() * 1e9)  # type: ignore[assignment]

    return install
