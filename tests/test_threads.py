"""aipo/threads.py: how many threads a rank gets."""

from __future__ import annotations

import os

import pytest

from aipo.errors import UserError
from aipo.threads import cpu_threads, settle


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("asked", "ranks", "launcher", "threads"),
    [
        (None, 1, None, 8),
        ("1", 1, None, 1),  # the user's own
        ("1", 1, "ACCELERATE_MIXED_PRECISION", 8),
        ("1", 2, "TORCHELASTIC_RUN_ID", 4),
        ("3", 2, "TORCHELASTIC_RUN_ID", 3),
        ("8", 2, "TORCHELASTIC_RUN_ID", 4),
        ("6,2", 1, None, 6),
        (None, 16, "TORCHELASTIC_RUN_ID", 1),
    ],
)
def test_threads_of_a_rank(eight_cores, monkeypatch, asked, ranks, launcher, threads) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    for name, value in (("OMP_NUM_THREADS", asked), (launcher, "set")):
        if name and value:
            monkeypatch.setenv(name, value)
    assert cpu_threads() == threads
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what settle() changes ends with the test
    settle()
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    assert cpu_threads() == threads  # once settled, it stays


@pytest.mark.parametrize("asked", ["0", "-1", "two"])
def test_no_number_of_threads(eight_cores, monkeypatch, asked) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    with pytest.raises(UserError, match=f"OMP_NUM_THREADS={asked}"):
        cpu_threads()
