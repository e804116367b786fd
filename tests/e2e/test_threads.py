"""The OpenMP that torch loads has been told how many threads a rank gets, and how they wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.e2e.launch import ROOT

pytestmark = pytest.mark.e2e

CORES = len(os.sched_getaffinity(0))


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
