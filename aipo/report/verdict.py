"""Did it learn, and what did it cost: the numbers at the top of a run's report."""

from __future__ import annotations

from dataclasses import dataclass, field

from aipo.metrics import Difference, best_point, cost_share, paired_bootstrap, trained_share
from aipo.record.progress import NAMES, duration, phases
from aipo.report.load import Row, Run


@dataclass(frozen=True)
class Flip:
    """A held-out question and the share of its samples that was right, before and after."""

    question: str
    before: float
    after: float


@dataclass(frozen=True)
class Verdict:
    """Accuracies in [0, 1]; None where the run does not say."""

    words: str
    tone: str  # good, bad, plain
    before: Row | None  # accuracy, low, high
    after: Row | None
    best: tuple[int, float] | None  # step, accuracy
    difference: Difference | None  # paired over questions
    gained: list[Flip] = field(default_factory=list)  # right in most samples after, not before
    lost: list[Flip] = field(default_factory=list)
    otf: float | None = None
    cost_share: float | None = None
    tokens: int = 0  # generated
    seconds: float = 0.0
    phases: list[tuple[str, float]] = field(default_factory=list)  # name, seconds of all steps
    memory: dict[str, int] = field(default_factory=dict)
    steps: int = 0

    @property
    def time(self) -> str:
        return duration(self.seconds)


def judge(run: Run) -> Verdict:
    """Everything at the top of the page."""
    validated = [line for line in run.metrics if line.get("validation/accuracy") is not None]
    before, after = (accuracy(validated[i]) if validated else None for i in (0, -1))
    best = best_point([(line["step"], line["validation/accuracy"]) for line in validated])
    flips, difference = [], None
    if len(run.held_out) > 1:
        first, last = (by_question(run.held_out[pick(run.held_out)]) for pick in (min, max))
        shared = [key for key in first if key in last]
        difference = paired_bootstrap([first[k][1] for k in shared], [last[k][1] for k in shared])
        flips = [Flip(first[key][0], first[key][1], last[key][1]) for key in shared]
    words, tone = in_words(before, after, difference)
    spent = [(NAMES.get(p, p), sum(line.get(f"time/{p}_s") or 0.0 for line in run.steps)) for p in phases(run.steps)]
    return Verdict(
        words=words,
        tone=tone,
        before=before,
        after=after if len(validated) > 1 else None,
        best=best,
        difference=difference,
        gained=sorted((f for f in flips if f.before < 0.5 <= f.after), key=lambda f: f.before - f.after),
        lost=sorted((f for f in flips if f.after < 0.5 <= f.before), key=lambda f: f.after - f.before),
        otf=trained_share(run.metrics),
        cost_share=cost_share(run.metrics),
        tokens=round(sum(line.get("rollout/tokens") or 0 for line in run.steps)),
        seconds=sum(seconds for _, seconds in spent),
        phases=spent,
        memory=run.summary.get("peak_memory_bytes", {}),
        steps=len(run.steps),
    )


def accuracy(line: Row) -> Row:
    return {
        "step": line["step"],
        "value": line["validation/accuracy"],
        "low": line.get("validation/accuracy_low"),
        "high": line.get("validation/accuracy_high"),
    }


def by_question(rows: list[Row]) -> dict[str, tuple[str, float]]:
    """id -> its text, or where that must not get out its id, and the share of its samples that is right."""
    return {row["id"]: (row["question"] or row["id"], sum(row["right"]) / len(row["right"])) for row in rows}


def in_words(before: Row | None, after: Row | None, difference: Difference | None) -> tuple[str, str]:
    if before is None or after is None or before["step"] == after["step"]:
        return "Not known: there is no validation before and after.", "plain"
    change = 100 * (after["value"] - before["value"])
    if difference is not None:
        low, high = 100 * difference.low, 100 * difference.high
        interval = f"{100 * difference.value:+.1f} points, 95 % [{low:+.1f}, {high:+.1f}], paired over questions"
        if not difference.real:
            return f"No change shown: {interval}.", "plain"
        return (f"It learned: {interval}.", "good") if difference.value > 0 else (f"It got worse: {interval}.", "bad")
    if None in (before["low"], after["low"]):
        return f"{change:+.1f} points.", "plain"
    if after["low"] > before["high"]:
        return f"It learned: {change:+.1f} points, the intervals do not meet.", "good"
    if after["high"] < before["low"]:
        return f"It got worse: {change:+.1f} points, the intervals do not meet.", "bad"
    return f"No change shown: {change:+.1f} points, the intervals overlap.", "plain"
