"""What should make someone look twice, in words, each with the place where the evidence is.

A rule looks at the whole run and returns an :class:`Advice`, or None where it cannot say. Thresholds are rules of thumb
of ours, not of any paper; each is in the words, so that a reader can judge it.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from aipo.curriculum import SMALL_BUCKET
from aipo.report.load import Row, Run
from aipo.report.page import percent
from aipo.report.selected import mean, spread
from aipo.rollout.check import TOLERANCE

LOOP = 8  # tokens
TIMES = 4  # so often the same in one completion: a loop
READ = 20  # steps whose rollouts are looked at


@dataclass(frozen=True)
class Advice:
    """``panel`` names a curve, ``step`` a step whose rollouts show it."""

    title: str
    words: str
    wrong: bool
    panel: str | None = None
    step: int | None = None


Sample = Sequence[tuple[int, Row]]
"""(step, rollout), from steps spread over the run"""


def advise(run: Run) -> list[Advice]:
    """All rules that can say something, those that found something first."""
    steps = spread(list(run.recorded()), READ)
    sample = [(step, row) for step in steps for group in run.groups(step) for row in group]
    found = [advice for rule in RULES if (advice := rule(run, sample)) is not None]
    return sorted(found, key=lambda advice: not advice.wrong)


def ends(run: Run, key: str) -> tuple[float, float] | None:
    """Mean of a metric over the first and the last fifth of the steps; None for fewer than five values."""
    values = [value for step, value in run.series(key) if step > 0 and isfinite(value)]
    if len(values) < 5:
        return None
    fifth = max(len(values) // 5, 1)
    return mean(values[:fifth]), mean(values[-fifth:])


def entropy(run: Run, _: Sample) -> Advice | None:
    if (both := ends(run, "policy/entropy")) is None:
        return None
    first, last = both
    words = f"{first:.2f} → {last:.2f} nats at selected tokens, first and last fifth (alarm: a third of the first)"
    return Advice("Entropy collapse", words, last < first / 3, "policy entropy, nats")


def length(run: Run, _: Sample) -> Advice | None:
    if (both := ends(run, "rollout/length_mean")) is None:
        return None
    first, last = both
    words = f"{first:.1f} → {last:.1f} tokens a completion (alarm: less than half, or more than twice)"
    wrong = not first / 2 <= last <= 2 * first
    return Advice("Length collapse" if last < first else "Length growth", words, wrong, "completion length, tokens")


def buckets(run: Run, _: Sample) -> Advice | None:
    sizes = [run.series(f"curriculum/questions_{name}") for name in ("easy", "medium", "hard")]
    if not run.config.get("curriculum.enabled", True) or not all(sizes):
        return None
    last = [series[-1][1] for series in sizes]
    words = f"easy {last[0]:.0f}, medium {last[1]:.0f}, hard {last[2]:.0f} questions at the end"
    words += f" (alarm: one has < {100 * SMALL_BUCKET:.0f} %)"
    return Advice("Collapse of a bucket", words, min(last) < SMALL_BUCKET * sum(last), "questions in a bucket")


def gaming(run: Run, _: Sample) -> Advice | None:
    reward, right = ends(run, "reward/mean"), ends(run, "reward/correct")
    if reward is None or right is None:
        return None
    up, better = reward[1] - reward[0], right[1] - right[0]
    parts = [
        f"{name} {both[1] - both[0]:+.3f}" for name in ("format", "length") if (both := ends(run, f"reward/{name}"))
    ]
    words = f"reward {up:+.3f}, of that right answers {better:+.3f}; {', '.join(parts)} (alarm: reward alone rises)"
    return Advice("Reward without correctness", words, up > 0.05 and better < 0.2 * up, "reward and its parts")


def truncation(run: Run, sample: Sample) -> Advice | None:
    if (both := ends(run, "rollout/truncated")) is None:
        return None
    words = f"{percent(both[0])} → {percent(both[1])} of completions are cut at rollout.max_tokens (alarm: 20 %)"
    step = next((step for step, row in reversed(sample) if row["finish_reason"] == "length"), None)
    return Advice("Truncation", words, both[1] > 0.2, "cut off, without an answer, no verdict", step)


def mismatch(run: Run, _: Sample) -> Advice | None:
    if (both := ends(run, "mismatch/gap")) is None:
        return None
    words = (
        f"{both[0]:.2g} → {both[1]:.2g} nats a token between engine and trainer (alarm: {TOLERANCE}, or three times)"
    )
    wrong = both[1] > TOLERANCE or (both[1] > 3 * both[0] and both[1] > 0.02)
    return Advice("Engine against trainer", words, wrong, "engine against trainer, nats")


def signal(run: Run, sample: Sample) -> Advice | None:
    if (both := ends(run, "rollout/used")) is None:
        return None
    words = f"{percent(both[0], 0)} → {percent(both[1], 0)} of the rollouts are in the update (alarm: under 30 %)"
    step = next((step for step, row in reversed(sample) if not row["used"]), None)
    return Advice("Groups without signal", words, both[1] < 0.3, "rollouts in the update", step)


def otf(run: Run, _: Sample) -> Advice | None:
    rule, both = run.config.get("mask.rule"), ends(run, "mask/otf")
    if both is None or rule in (None, "all"):
        return None
    panel = "share of tokens trained on (OTF), of all generated"
    share = f"{percent(both[0])} → {percent(both[1])} of the tokens"
    if rule in ("top_fraction", "random", "bernoulli"):
        target = run.config["mask.fraction"]
        words = f"{share}, target {percent(target, 0)} (alarm: off by a quarter)"
        return Advice("OTF far from its target", words, abs(both[1] - target) > target / 4, panel)
    words = f"{share} (alarm: under 5 % or over 60 %: a threshold is to take a tail)"
    return Advice("OTF far from its target", words, not 0.05 <= both[1] <= 0.6, panel)


def kappa(run: Run, _: Sample) -> Advice | None:
    values = run.series("mask/kappa")
    uses = run.config.get("mask.rule") in ("threshold", "peaks_only")
    if len(values) < 10 or not uses or not kappa_moves(run):
        return None
    first, last = values[0][1], values[-1][1]
    words = f"{first:.3g} → {last:.3g} over {len(values)} steps (alarm: it has not moved)"
    return Advice("κ stuck", words, first == last, "mask threshold κ")


def kappa_moves(run: Run) -> bool:
    """Whether the schedule lowers κ; ``plateau`` does so at stalls alone."""
    config = run.config
    schedule, stalled = config.get("mask.kappa_schedule"), any(count for _, count in run.series("curriculum/stalls"))
    falls = schedule != "constant" and (schedule != "plateau" or stalled)
    return falls and config.get("mask.kappa_start") != config.get("mask.kappa_end")


def loops(run: Run, sample: Sample) -> Advice | None:
    looping = [(step, loops_in(row["tokens"])) for step, row in sample]
    if not looping:
        return None
    late = [loop for _, loop in looping[-max(len(looping) // 5, 1) :]]
    words = f"{percent(mean(late))} of late completions repeat {LOOP} tokens {TIMES} times or more (alarm: 10 %)"
    step = next((step for step, loop in reversed(looping) if loop), None)
    return Advice("Repetition", words, mean(late) > 0.1, step=step)


def loops_in(tokens: Sequence[str]) -> bool:
    counts = Counter(tuple(tokens[i : i + LOOP]) for i in range(len(tokens) - LOOP + 1))
    return max(counts.values(), default=0) >= TIMES


def language(run: Run, sample: Sample) -> Advice | None:
    """By script, which is all that can be told without a model."""
    told = [(step, a, b) for step, row in sample if (a := script(row["question"])) and (b := script(row["completion"]))]
    if not told:
        return None
    other = mean([a != b for _, a, b in told])
    step = next((step for step, a, b in reversed(told) if a != b), None)
    words = f"{percent(other)} of completions are written mostly in another script than their question (alarm: 5 %)"
    return Advice("Another language than the prompt's", words, other > 0.05, step=step)


def script(text: str) -> str | None:
    """The script of most letters, such as LATIN or CJK; None for fewer than five letters."""
    letters = [c for c in text[:2000] if c.isalpha()]
    if len(letters) < 5:
        return None
    return Counter(unicodedata.name(c, "?").split()[0] for c in letters).most_common(1)[0][0]


def verifier(run: Run, _: Sample) -> Advice | None:
    shares = [
        mean([value for step, value in run.series(f"reward/{key}") if step > 0]) for key in ("timed_out", "killed")
    ]
    if not run.series("reward/timed_out"):
        return None
    late, killed = (percent(share, 2) for share in shares)
    words = f"{late} of checks took too long, {killed} killed their process (alarm: 0.5 % together)"
    return Advice("Verifier", words, sum(shares) > 0.005, "cut off, without an answer, no verdict")


def skipped(run: Run, _: Sample) -> Advice | None:
    values = run.series("loss/skipped_steps")
    if not values:
        return None
    bad = [step for step, value in values if value > 0]
    words = f"{len(bad)} of {len(values)} steps had an update skipped that was not finite"
    if bad:
        words += f": {', '.join(map(str, bad[:10]))}"
    return Advice("Skipped steps", words, bool(bad), "gradient norm", bad[0] if bad else None)


RULES: tuple[Callable[[Run, Sample], Advice | None], ...] = (
    gaming, entropy, length, buckets, signal, otf, kappa, mismatch, truncation, loops, language, verifier, skipped,
)  # fmt: skip
