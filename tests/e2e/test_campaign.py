"""A campaign as a user runs it: two conditions, three seeds, killed in the middle, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from aipo.campaign.cells import make_plan
from tests import processes
from tests.e2e.launch import ROOT
from tests.processes import Guard
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e

CAMPAIGN = """
base: tiny.yaml
common:
  model: {path: MODEL, dtype: float32}
  rollout: {engine: hf, check_sync: false, max_tokens: 8}
  reward.correctness: 0.5
  reward.length: 0.5
  sharding.zero_stage: 0
  validation.questions: 2
  curriculum.enabled: false
conditions:
  all: {mask.rule: all}
  random: {mask.rule: random}
seeds: 3
control: random
columns: [accuracy, mag, otf, steps]
"""


def test_a_killed_campaign_resumes_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CAMPAIGN.replace("MODEL", str(make_tiny(tmp_path / "model"))))
    runs = tmp_path / "runs"
    plan = make_plan(path, runs)
    command = [sys.executable, "sweep.py", str(path), "--runs", str(runs)]
    # SIGKILL once some are done and one is at its work
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL) as campaign:
        guard = Guard(campaign.pid)
        while not (sum(not job.missing for job in plan.jobs) == 2 and plan.jobs[2].reached > 0):
            assert campaign.poll() is None
            guard.check()
            time.sleep(0.02)
        os.killpg(campaign.pid, signal.SIGKILL)
    states = [job.state() for job in plan.jobs]
    assert states[:2] == ["done", "done"]
    assert states[3:] == ["waiting"] * 3
    before = {job.key: (job.place / "summary.json").stat().st_mtime_ns for job in plan.jobs[:2]}
    done = processes.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 runs: 2 are there, 4 to do, 1 at once" in done.stdout
    assert [job.state() for job in plan.jobs] == ["done"] * 6
    for job in plan.jobs[:2]:  # untouched
        assert (job.place / "summary.json").stat().st_mtime_ns == before[job.key]
    starts = [len((job.place / "command.txt").read_text().splitlines()) for job in plan.jobs]
    assert starts[:2] == [1, 1]
    assert starts[3:] == [1, 1, 1]
    for job in plan.jobs:  # each step once, in order, whoever was killed
        steps = [json.loads(line)["step"] for line in (job.place / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(5))
        assert not (job.place / "final").exists()
    table = pd.read_parquet(plan.folder / "runs.parquet")
    assert list(table["state"]) == ["done"] * 6
    assert set(table[table["condition"] == "all"]["otf"].round(6)) == {100.0}
    assert "Against random" in (plan.folder / "report.md").read_text()
    # another campaign with one of the conditions has nothing left to do for it
    path.write_text(path.read_text().replace("random: {mask.rule: random}", "peaks: {mask.rule: peaks_only}"))
    path.write_text(path.read_text().replace("control: random", "control: all"))
    again = make_plan(path, runs)
    assert [bool(job.missing) for job in again.jobs] == [False, True] * 3
