"""What is shown of a run: the forecast after the second step, on a clock that the test turns; progress; the table."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from aipo.metrics import Accuracy
from aipo.record.progress import Progress, duration, final_table, summarize


def lines(steps: int, seconds: float, budget: int | None = None) -> list[str]:
    """What is printed over three steps of 50 tokens, with start-up and a first validation of 100 s each."""
    now = [0.0]
    out = io.StringIO()
    progress = Progress(
        steps,
        console=Console(file=out),
        clock=lambda: now[0],
        every={"validation": 20},
        budget=budget,
        why_long=lambda: ["two threads wait: let them"],
    )
    now[0] += 100
    with progress.task("validation", 1):
        now[0] += 100
    for step in (1, 2, 3):
        now[0] += seconds
        progress.update(step, {}, 50 * step)
    return out.getvalue().splitlines()


def forecast(steps: int, seconds: float) -> list[str]:
    return [line for line in lines(steps, seconds) if not line.startswith("step ")]


def test_the_time_of_all_is_said_once_after_the_second_step() -> None:
    # 200 s before, 40 steps, validations after 20 and 40
    assert forecast(40, 10.0) == ["expected in all: 13m20s, 10.0 s a step"]
    assert forecast(2, 10.0) == []  # nothing is left


def test_a_budget_of_tokens_ends_a_run_before_its_steps() -> None:
    # 200 s before, 1,010 tokens are 21 steps of 50, validations after 20 and 21
    assert lines(40, 10.0, budget=1010)[1:3] == [
        "step 2/21 · ETA 3m10s",
        "expected in all: 10m10s, 10.0 s a step",
    ]
    assert lines(40, 10.0, budget=150)[-1] == "step 3/3 · ETA 0s"
    assert lines(40, 10.0, budget=2500)[-1] == "step 3/40 · ETA 6m10s"


def test_a_pass_within_the_second_step_counts_once() -> None:
    out, now = io.StringIO(), [0.0]
    every = {"validation": 2}
    progress = Progress(11, console=Console(file=out), clock=lambda: now[0], every=every)
    for step in (1, 2):
        now[0] += 10
        if step == 2:
            with progress.task("validation", 1):
                now[0] += 7
        progress.update(step, {})
    # 27 s of two steps, nine more of 10 and 35 of validations after 4, 6, 8, 10 and the last
    assert out.getvalue().splitlines()[-1] == "expected in all: 2m32s, 10.0 s a step"


def test_beyond_an_hour_the_reasons_follow() -> None:
    # 200 + 42 * 100 + 3 * 100: the last step is validated, too
    assert forecast(42, 100.0) == [
        "expected in all: 1h18m, 100.0 s a step",
        "that is over an hour, because:",
        "- two threads wait: let them",
    ]


# --- what is shown


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


SPEAKS = """
import os, signal, sys
from pathlib import Path
from aipo.record.progress import Progress
from aipo.run import signals

with signals() as caught, Progress(4) as progress:
    sys.stdin.readline()
    for step in (1, 2, 3):
        progress.update(step, {})
    os.kill(os.getpid(), signal.SIGINT)
    progress.say("saved")
Path(sys.argv[1]).write_text(str(caught))
"""


@pytest.mark.slow
def test_a_run_outlives_who_reads_it(tmp_path: Path) -> None:
    """Ctrl-C reaches ``train.py 2>&1 | tee log`` as a whole: the checkpoint is still to come."""
    reading, writing = os.pipe()
    command = [sys.executable, "-c", SPEAKS, str(tmp_path / "saved")]
    run = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=writing, stderr=writing, cwd=Path(__file__).parents[2]
    )
    os.close(writing)
    os.close(reading)
    run.communicate(b"go\n", timeout=120)
    assert run.returncode == 0
    assert (tmp_path / "saved").read_text() == f"[{signal.SIGINT.value}]"
