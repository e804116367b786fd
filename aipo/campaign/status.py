"""A campaign as it stands: each run with its state, step and held-out accuracy, and when all will be done."""

from __future__ import annotations

import itertools
import json
import math
import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aipo.campaign.cells import Plan
from aipo.campaign.estimate import Estimate, estimates, hours
from aipo.campaign.jobs import Job, State, failure
from aipo.record.jsonl import read_jsonl

STYLES: dict[State, str] = {"done": "green", "running": "cyan", "failed": "red", "begun": "yellow", "waiting": "dim"}


Seen = dict[str, tuple[float, int]]  # job key -> when a run at work was first seen, s, and at which step


def time_left(job: Job, state: State, estimate: Estimate, seen: Seen, now: float) -> float:
    """Seconds that a job will still take, by its own pace since it was first seen, else by the estimate."""
    if state != "running":
        seen.pop(job.key, None)
        return 0.0 if state == "done" else estimate.seconds
    began, first = seen.setdefault(job.key, (now, job.reached))
    if job.reached > first and now > began:
        return (job.last - job.reached) * (now - began) / (job.reached - first)
    return estimate.seconds


def render(plan: Plan, seen: Seen, made: dict[str, Estimate]) -> Group:
    table = Table(title=f"{plan.name}: {plan.campaign.title}", title_justify="left")
    for column in ("run", "state", "step", plan.campaign.metric, "left"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", overflow="fold")
    now, counts, seconds, failures = time.monotonic(), dict.fromkeys(STYLES, 0), [], []
    for job in plan.jobs:
        state = job.state()
        counts[state] += 1
        left = time_left(job, state, made[job.key], seen, now)
        if state not in ("done", "failed"):
            seconds.append(left)
        if state == "failed":
            failures.append(Text(f"{job.name}: {failure(job)}", style="red"))
        values = [line.get(plan.campaign.metric) for line in read_jsonl(job.place / "metrics.jsonl")]
        last = next((value for value in reversed(values) if value is not None), None)
        table.add_row(
            job.name, Text(state, style=STYLES[state]), f"{job.reached}/{job.last}" if job.steps else "",
            "" if last is None else f"{last:.3f}", "" if state in ("done", "failed") else hours(left),
        )  # fmt: skip
    known = sum(each for each in seconds if not math.isnan(each)) / max(counts["running"], 1)
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    eta = f"ETA {hours(known)} at {max(counts['running'], 1)} at once" if seconds else "nothing is left to run"
    return Group(table, *failures, Text(f"{states} · {eta}"))


def show(plan: Plan, console: Console, cores: int, *, every: float = 2.0) -> None:
    """On a terminal a table that stays live until all is done or Ctrl-C; in a file once. ``cores``: of a run."""
    seen: Seen = {}
    made = estimates(plan, cores_of(plan, cores))
    if not console.is_terminal:
        console.print(render(plan, seen, made))
        return
    with Live(render(plan, seen, made), console=console, auto_refresh=False) as live:
        for looks in itertools.count(1):
            if not any(job.missing for job in plan.jobs):
                return
            time.sleep(every)
            if looks % 30 == 0:  # by then more may have been measured
                made = estimates(plan, cores_of(plan, cores))
            live.update(render(plan, seen, made), refresh=True)


def cores_of(plan: Plan, otherwise: int) -> int:
    """Cores of its newest run, for those that wait."""
    noted = [path for job in plan.jobs if (path := job.place / "cell.json").is_file()]
    newest = max(noted, key=lambda path: path.stat().st_mtime, default=None)
    return int(json.loads(newest.read_text())["cores"]) if newest else otherwise
