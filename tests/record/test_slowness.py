"""Reasons are made one by one, and named; without one none is."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from aipo.model.precision import Precision
from aipo.record import slowness
from aipo.record.slowness import Slowness


@pytest.fixture(autouse=True)
def four_idle_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    clock(monkeypatch, (0.0, 0.0, 0.0), (100.0, 300.0, 290.0))


def clock(monkeypatch: pytest.MonkeyPatch, *readings: tuple[float, float, float]) -> None:
    """Wall clock, CPU time of all, of ours, at the two readings."""
    read = iter(readings)
    monkeypatch.setattr(slowness, "_cpu_seconds", lambda: next(read))


def reasons(dtype: str = "float32", warning: str | None = None, device: str = "cpu") -> list[str]:
    return Slowness(Precision(dtype, "", warning), device).reasons()


def test_nothing_wrong() -> None:
    (only,) = reasons()
    assert "optim.steps" in only


def test_a_slow_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reasons("bfloat16", "no instructions: use float32") == ["no instructions: use float32"]
    monkeypatch.setattr(slowness, "gains_from_bf16", lambda device: (True, device, ""))
    clock(monkeypatch, (0.0, 0.0, 0.0))
    (only,) = reasons("float32", device="cuda")
    assert "model.dtype=auto" in only


def test_threads_cores_and_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (only,) = reasons()
    assert "OMP_NUM_THREADS=4" in only
    clock(monkeypatch, (0.0, 0.0, 0.0), (100.0, 300.0, 290.0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (only,) = reasons()
    assert only.startswith("the process may run on 4 of 8 cores")
    clock(monkeypatch, (0.0, 0.0, 0.0), (100.0, 300.0, 290.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(slowness, "_affinities", lambda: [{0, 1, 2, 3}, {0}, {1}])
    (only,) = reasons()
    assert only.startswith("2 threads are bound")


def test_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, (10.0, 50.0, 20.0), (110.0, 400.0, 220.0))  # 350 s in 100 s, 200 of them ours
    (only,) = reasons()
    assert only.startswith("other programs kept 1.5 of the machine's 4 cores busy")


def test_own_work_is_not_taken_for_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    _, busy, own = slowness._cpu_seconds()
    used = SimpleNamespace(before=sum(os.times()[:2]))
    while sum(os.times()[:2]) - used.before < 0.2:
        pass
    _, busy_then, own_then = slowness._cpu_seconds()
    assert own_then - own >= 0.15
    assert busy_then - busy >= 0.15
