"""The forecast after the second step: sums by hand on a clock that the test turns."""

from __future__ import annotations

import io

from rich.console import Console

from aipo.record.progress import Progress


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
