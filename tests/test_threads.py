"""aipo/threads.py: how many threads a rank gets, and that the OpenMP which torch loads has been told."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from aipo.errors import UserError
from aipo.threads import cpu_threads, settle
from tests.e2e.launch import ROOT

CORES = len(os.sched_getaffinity(0))


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


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("launcher", "asked", "policy", "spins", "threads"),
    [
        ([sys.executable], {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", None, 1),
        (["accelerate", "launch"], {}, "PASSIVE", "2000", CORES),
        (
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
            {"OMP_NUM_THREADS": str(CORES)},
            "PASSIVE",
            "2000",
            max(1, CORES // 2),
        ),
    ],
)
def test_openmp_is_told_in_time(tmp_path, launcher, asked, policy, spins, threads) -> None:
    """OpenMP says what it read, when it is loaded; then the run ends, for want of a model."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [*launcher, "train.py", "--config", "tiny.yaml", f"model.path={tmp_path / 'absent'}"],
        cwd=ROOT,
        env=environment | asked | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "error: model" in done.stderr, done.stderr[-3000:]
    # the launchers import torch themselves, before the rank does: what was loaded last is the rank's
    assert re.findall(r"OMP_WAIT_POLICY = '(\w+)'", done.stderr)[-1] == policy
    assert spins in (None, re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[-1])
    assert re.findall(r"OMP_NUM_THREADS = '(\d+)'", done.stderr)[-1] == str(threads)
