"""Why a run takes long on this machine, and what to change."""

from __future__ import annotations

import os
import time

import psutil
import torch

from aipo.model.precision import Precision, gains_from_bf16

BUSY = 0.25  # share of the machine's cores from which other programs are worth a word


class Slowness:
    """Looks at the machine from its making on; asked once, where a run is expected to take over an hour."""

    def __init__(self, precision: Precision, device: str) -> None:
        self._precision, self._device = precision, device
        self._began = _cpu_seconds()

    def reasons(self) -> list[str]:
        """Each with what to change; only what was found, and where nothing was, what shortens any run."""
        found = [*self._dtype(), *(self._threads() + self._others() if self._device == "cpu" else [])]
        return found or [
            "nothing wrong was found on this machine: fewer optim.steps, rollout.questions_per_step or "
            "rollout.samples_per_question, or a smaller model.path, shorten the run"
        ]

    def _dtype(self) -> list[str]:
        if self._precision.warning:
            return [self._precision.warning]
        if self._device == "cuda" and self._precision.dtype == "float32" and gains_from_bf16("cuda")[0]:
            return ["model.dtype is float32 on a GPU that multiplies bfloat16: model.dtype=auto would take it"]
        return []

    def _threads(self) -> list[str]:
        mine = len(os.sched_getaffinity(0))
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads, share = torch.get_num_threads(), max(1, mine // ranks)
        found = []
        if threads < share:
            found.append(f"{threads} of the {share} threads that this rank could use: OMP_NUM_THREADS={share}")
        if mine < (cores := os.cpu_count() or 1):
            found.append(
                f"the process may run on {mine} of {cores} cores: give it more (taskset, container, job script)"
            )
        if bound := sum(len(cores) < mine for cores in _affinities()):
            found.append(
                f"{bound} threads are bound to a part of its cores, where they wait for whatever else runs there: "
                "unset OMP_PROC_BIND, GOMP_CPU_AFFINITY and VLLM_CPU_OMP_THREADS_BIND"
            )
        return found

    def _others(self) -> list[str]:
        when, busy, own = (now - then for now, then in zip(_cpu_seconds(), self._began))
        cores = os.cpu_count() or 1
        others = (busy - own) / when
        if others < BUSY * cores:
            return []
        return [f"other programs kept {others:.1f} of the machine's {cores} cores busy: stop them, or wait for them"]


def _affinities() -> list[set[int]]:
    """Cores of each thread of this process."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        try:
            found.append(os.sched_getaffinity(int(thread)))
        except ProcessLookupError:  # it has ended meanwhile
            continue
    return found


def _cpu_seconds() -> tuple[float, float, float]:
    """Wall clock; CPU time that the machine gave to anybody; that of this run, whose ranks are taken to be alike."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # are in user and nice already
    own = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            own += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:  # a verifier that was replaced
            continue
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return time.monotonic(), sum(times) - idle - guests, own * ranks
