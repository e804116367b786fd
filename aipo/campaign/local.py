"""Run jobs on this machine: n at once, each on cores and GPUs of its own."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from aipo.campaign.jobs import Job, failure, run_job
from aipo.errors import UserError


def slots(workers: int | None, gpus_each: int, gpus: Sequence[str], cores: Sequence[int]) -> list[dict[str, list[Any]]]:
    """Cores and GPUs of each worker: equal shares, none in two but for cores where there are more GPUs than cores.

    ``workers`` None is as many as there are shares of ``gpus_each`` GPUs; without a GPU it is one.
    """
    if gpus and len(gpus) < gpus_each:
        raise UserError(f"gpus: a run asks for {gpus_each}, here are {len(gpus)}: submit it with --slurm")
    if not gpus and gpus_each > 1:
        raise UserError(f"gpus: a run asks for {gpus_each}, and this machine has none: --dry-run, or --slurm")
    most = len(gpus) // gpus_each if gpus else len(cores)
    count = workers or (most if gpus else 1)
    if count > most:
        what = f"{len(gpus)} GPUs for {gpus_each} a run" if gpus else f"{len(cores)} cores"
        raise UserError(f"--workers {count}: there are {what}, so at most {most}")
    share = max(1, len(cores) // count)
    in_turn = list(cores) * count
    return [
        {"cores": in_turn[i * share : (i + 1) * share], "gpus": list(gpus[i * gpus_each : (i + 1) * gpus_each])}
        for i in range(count)
    ]


def run_jobs(jobs: Sequence[Job], places: Sequence[dict[str, list[Any]]], say: Callable[[str], None]) -> bool | None:
    """Run what is missing; one that fails stops no other. Whether all are done now; None if a signal stopped it."""
    left = [job for job in jobs if job.missing]
    say(f"{len(jobs)} runs: {len(jobs) - len(left)} are there, {len(left)} to do, {len(places)} at once")
    free: queue.SimpleQueue[dict[str, list[Any]]] = queue.SimpleQueue()
    for place in places:
        free.put(place)
    count = iter(range(1, len(left) + 1))

    def work(job: Job, stopped: threading.Event) -> bool:
        if stopped.is_set():
            return False
        place = free.get()
        try:
            # of this thread; what it starts inherits them
            os.sched_setaffinity(threading.get_native_id(), place["cores"])
            gpus = {"CUDA_VISIBLE_DEVICES": ",".join(place["gpus"])} if place["gpus"] else {}
            say(f"{next(count)}/{len(left)} {job.name}" + (f", from step {job.reached}" if job.reached else ""))
            began = time.monotonic()
            outcome = run_job(job, environment=gpus, stopped=stopped.is_set)
            took = time.monotonic() - began
            say(f"{job.name}: {outcome} after {took:.0f} s" + (f": {failure(job)}" if outcome == "failed" else ""))
            return outcome == "done"
        except Exception as error:  # such as a full disk: it stops no other
            say(f"{job.name}: failed: {error!r}")
            return False
        finally:
            free.put(place)

    with stopping(say) as stopped, ThreadPoolExecutor(len(places)) as pool:
        outcomes = list(pool.map(lambda job: work(job, stopped), left))
    return None if stopped.is_set() else all(outcomes)


@contextmanager
def stopping(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event: runs save and end, and the same command goes on from there."""
    event = threading.Event()

    def note(*_: Any) -> None:
        first = not event.is_set()
        event.set()
        if first:
            say("stopping: runs save a checkpoint after their step; the same command goes on from there")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
