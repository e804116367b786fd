"""What the user sees: a live display on a terminal, plain lines in a file, and a table at the end."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from aipo.metrics import Accuracy, cost_share, trained_share
from aipo.record.checkpoints import write_atomically
from aipo.record.jsonl import plain

# Label, metric, format; a field without a value yet is not shown.
FIELDS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("held-out", "validation/accuracy", "{:.1%}"),
    ("OTF", "mask/otf", "{:.1%}"),
    ("tokens/s", "speed/tokens_per_s", "{:.0f}"),
)
PHASES = ("rollout", "reward", "forward", "mi", "backward", "optimizer", "sync")
NAMES = {"mi": "MI"}
LONG = 3600.0  # seconds of a run from which it says why it takes so long


def duration(seconds: float) -> str:
    """``7s``, ``3m20s``, ``2h05m``, ``1d03h``."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{total % 60:02d}s" if minutes else f"{total}s"


def last_step(steps: int, budget: int | None, step: int, generated: float) -> int:
    """The step that a run will end with: ``steps``, or an earlier one with which its ``budget`` of tokens is used up.

    That one is known only from what ``step`` steps have ``generated``: the others are taken to generate as much.
    """
    if budget is None or not generated:
        return steps
    return min(steps, max(step, math.ceil(step * budget / generated)))


class RunConsole(Console):
    """Goes quiet where nobody reads any more: a run outlives the ``tee`` behind it, and what it says is in its logs."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Progress:
    """Progress of the training and of the longer passes in it; silent unless ``active`` (rank 0).

    Without ``total_steps`` there is no training, only passes.

    On a terminal: bars that stay in place. Elsewhere: a line for each step, and for a pass a line every tenth of it.
    After the second step it says how long all will take, and for over an hour what ``why_long`` gives as reasons.
    ``every`` names the passes that come back every so many steps and after the last, with that number. ``budget``: of
    generated tokens, with which the training ends before ``total_steps``.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        *,
        active: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        every: Mapping[str, int] | None = None,
        budget: int | None = None,
        why_long: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._steps = self._total = total_steps or 0
        self._budget = budget
        self._active = active
        self._console = console or RunConsole()
        self._clock = clock
        self._every, self._why_long = every or {}, why_long
        self._took: dict[str, float] = {}  # seconds of the last pass of a name
        self._began = clock()
        self._times: deque[tuple[int, float]] = deque(maxlen=21)  # (step, when): ETA from the last 20 steps
        self._shown: dict[str, str] = {}
        self._live: RichProgress | None = None
        if active and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
            self._live = RichProgress(*columns, TextColumn("{task.fields[detail]}"), console=self._console)
            self._live.start()
            self._bar = self._live.add_task("training", total=total_steps, detail="", visible=total_steps is not None)

    def update(self, step: int, metrics: Mapping[str, float | None], generated: float = 0) -> None:
        """``step`` steps are done, with ``generated`` tokens; ``metrics`` as they are logged.

        The last value of each field stays in sight.
        """
        if not self._active:
            return
        self._total = last_step(self._steps, self._budget, step, generated)
        self._times.append((step, self._clock()))
        for label, key, form in FIELDS:
            if (value := metrics.get(key)) is not None:
                self._shown[label] = form.format(value)
        fields = [f"{label} {value}" for label, value in self._shown.items()]
        if (eta := self._eta(step)) is not None:
            fields.insert(0, f"ETA {duration(eta)}")
        if self._live is not None:
            self._live.update(self._bar, completed=step, total=self._total, detail=" · ".join(fields))
        else:
            self._line(" · ".join([f"step {step}/{self._total}", *fields]))
        if len(self._times) == 2 and eta:
            self._foresee(step, eta)

    def _foresee(self, step: int, left: float) -> None:
        """``left`` seconds of steps; the passes between them are taken to last as long as the last of their kind."""
        within = sum(self._took.get(name, 0.0) for name, every in self._every.items() if step % every == 0)
        left -= within * (self._total - step)  # of steps alone
        expected = self._times[-1][1] - self._began + left
        for name, every in self._every.items():
            expected += self._took.get(name, 0.0) * (math.ceil(self._total / every) - step // every)
        self._line(f"expected in all: {duration(expected)}, {left / (self._total - step):.1f} s a step")
        if expected > LONG:
            self._line("that is over an hour, because:")
            for reason in self._why_long():
                self._line(f"- {reason}")

    def _eta(self, step: int) -> float | None:
        first_step, first_time = self._times[0]
        if step <= first_step:
            return None
        return (self._times[-1][1] - first_time) / (step - first_step) * (self._total - step)

    def say(self, text: str) -> None:
        """A message above the bars."""
        if self._active:
            self._line(text)

    def _line(self, text: str) -> None:
        # One line is one line, however narrow the console thinks a file is.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Task]:
        """Progress of a pass over ``total`` things: ``with progress.task("labelling", 500) as t: t.advance(8)``."""
        task = Task(self, name, total)
        try:
            yield task
        finally:
            task._close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Task:
    """One pass with an end; made by :meth:`Progress.task`."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress, self._name, self._total = progress, name, total
        self._done = 0
        self._tenths = 0
        self._began = progress._clock()
        self._bar = progress._live.add_task(name, total=total, detail="") if progress._live else None

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self._done += count
        progress = self._progress
        if not progress._active or not self._done:
            return
        left = (progress._clock() - self._began) / self._done * (self._total - self._done)
        if progress._live is not None and self._bar is not None:
            progress._live.update(self._bar, completed=self._done, detail=f"ETA {duration(left)}")
        elif (tenths := 10 * self._done // max(self._total, 1)) > self._tenths:
            self._tenths = tenths
            share = f"{self._done / self._total:.0%}"
            progress._line(f"{self._name} {self._done}/{self._total} ({share}) · ETA {duration(left)}")

    def _close(self) -> None:
        self._progress._took[self._name] = self._progress._clock() - self._began
        if self._progress._live is not None and self._bar is not None:
            self._progress._live.remove_task(self._bar)


@dataclass(frozen=True)
class Summary:
    """A finished run in numbers. Accuracies and OTF in [0, 1]; NaN where the metrics do not say."""

    before: Accuracy
    after: Accuracy
    otf: float  # Σ trained tokens / Σ completion tokens of the rollouts that the updates read
    cost_share: float  # Σ trained tokens / Σ generated tokens
    length: float  # mean completion length over the run, tokens
    no_answer: float  # share of rollouts without an extractable answer
    timed_out: float  # whose answer took the verifier too long
    killed: float  # whose answer cost a verifier process its memory limit or its life
    seconds: dict[str, float]  # mean over steps, by phase
    steps: int
    peak_memory_bytes: dict[str, int]
    run_folder: str


def phases(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of which there are times, those of the step in its order, others after them."""
    keys = {key for line in metrics for key in line if key.startswith("time/") and key.endswith("_s")}
    found = {key.removeprefix("time/").removesuffix("_s") for key in keys}
    return [*(phase for phase in PHASES if phase in found), *sorted(found.difference(PHASES))]


def summarize(
    metrics: Sequence[Mapping[str, Any]],
    *,
    before: Accuracy,
    after: Accuracy,
    peak_memory_bytes: dict[str, int],
    run_folder: Path,
) -> Summary:
    """Sum up the lines of ``metrics.jsonl``, so that a resumed run is summed up whole.

    Uses ``mask/otf`` and ``mask/cost_share``, weighted by the tokens that they are shares of, ``rollout/length_mean``
    and ``time/<phase>_s``.
    """
    steps = [line for line in metrics if line.get("mask/otf") is not None]
    otf, cost = trained_share(metrics), cost_share(metrics)
    return Summary(
        before=before,
        after=after,
        otf=math.nan if otf is None else otf,
        cost_share=math.nan if cost is None else cost,
        length=_mean(metrics, "rollout/length_mean"),
        no_answer=_mean(steps, "reward/no_answer"),
        timed_out=_mean(steps, "reward/timed_out"),
        killed=_mean(steps, "reward/killed"),
        seconds={phase: _mean(metrics, f"time/{phase}_s") for phase in phases(metrics)},
        steps=len(steps),
        peak_memory_bytes=peak_memory_bytes,
        run_folder=str(run_folder),
    )


def _mean(metrics: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [line[key] for line in metrics if line.get(key) is not None]
    return sum(values) / len(values) if values else math.nan


def final_table(summary: Summary, *, console: Console | None = None) -> None:
    """Print the table that ends a run and leave it in the run folder as ``summary.md`` and ``summary.json``."""
    rows = [
        ("held-out accuracy before", f"{summary.before} (95 %)"),
        ("held-out accuracy after", f"{summary.after} (95 %)"),
        ("questions × samples", f"{summary.after.problems} × {summary.after.samples / summary.after.problems:g}"),
        ("tokens trained on (OTF)", f"{100 * summary.otf:.2f} %"),
        ("tokens trained on / generated", f"{100 * summary.cost_share:.2f} %"),
        ("mean completion length", f"{summary.length:.1f} tokens"),
        ("without an answer", f"{100 * summary.no_answer:.1f} %"),
        ("check timed out / killed", f"{100 * summary.timed_out:.2f} % / {100 * summary.killed:.2f} %"),
        ("steps", str(summary.steps)),
        *((f"{NAMES.get(phase, phase)}, per step", f"{s:.2f} s") for phase, s in summary.seconds.items()),
        *((f"peak memory, {where}", f"{size / 2**30:.1f} GiB") for where, size in summary.peak_memory_bytes.items()),
        ("run folder", summary.run_folder),
    ]
    table = Table(show_header=False, title="Run summary", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), Text(value))
    folder = Path(summary.run_folder)
    lines = ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    write_atomically(folder / "summary.md", "\n".join(lines) + "\n")
    write_atomically(folder / "summary.json", json.dumps(plain(asdict(summary)), indent=1) + "\n")
    (console or RunConsole()).print(table)
