"""Easy questions first: sampling by difficulty and the decay of kappa (AIPO, section 3.3 and Algorithm 1).

A question's difficulty is the number of information peaks in one trajectory of the initial policy. Three buckets,
easy, medium and hard, are drawn from in proportions that move with a clock, which is the training step plus what
stalls of the validation accuracy add to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from aipo.config.base import BucketBy, KappaSchedule
from aipo.config.sections import CurriculumConfig, MaskConfig
from aipo.mask import count_peaks, peaks, prefix_share

Mixture = tuple[float, float, float]

NAMES = ("easy", "medium", "hard")
SMALL_BUCKET = 0.05  # share of the questions below which a bucket is worth a warning
STALL_ADVANCE = 0.05  # share of all steps that a stall adds to the clock


def mixture(
    step: float,
    total_steps: int,
    *,
    t1: float = 0.3,
    t2: float = 0.7,
    start: Mixture = (0.70, 0.25, 0.05),
    end: Mixture = (0.25, 0.35, 0.40),
) -> Mixture:
    """Shares of easy, medium and hard questions: ``start`` before t1 S, ``end`` from t2 S on, linear between."""
    progress = step / total_steps
    if progress < t1:
        return start
    if progress >= t2:
        return end
    tau = (progress - t1) / (t2 - t1)
    easy, medium, hard = ((1 - tau) * a + tau * b for a, b in zip(start, end))
    return easy, medium, hard


def kappa_at(
    step: float,
    *,
    start: float = 0.3,
    end: float = 0.1,
    decay_steps: int,
    stalls: int = 0,
    stall_drop: float = 0.05,
    schedule: KappaSchedule = "combined",
) -> float:
    """kappa(t) = max(end, start - (start - end) t / decay_steps - stall_drop * stalls).

    Line 42 of Algorithm 1 overwrites line 40 as printed; ``combined`` keeps both decays, ``linear`` the one by steps,
    ``plateau`` the one by stalls, ``constant`` neither. ``literal`` is line 42 after line 40: ``linear``, for a
    ``step`` of the curriculum's clock, which stalls advance.
    """
    if schedule in ("combined", "linear", "literal"):
        start -= (start - end) * step / decay_steps
    if schedule in ("combined", "plateau"):
        start -= stall_drop * stalls
    return start if schedule == "constant" else max(end, start)


def bucket_of(n_peak: float, cuts: tuple[float, float] = (15, 25)) -> int:
    """0 easy (up to the first cut), 1 medium (up to the second), 2 hard."""
    return int(n_peak > cuts[0]) + int(n_peak > cuts[1])


def peak_label(scores: Tensor, mask: MaskConfig, by: BucketBy = "quantile", probe_tokens: int = 512) -> float:
    """N_peak of a trajectory's scores (T,), from its first ``probe_tokens``, by ``mask.statistic`` at ``kappa_start``.

    ``count`` is clipped to 0..40. ``quantile`` compares questions with each other: clipped, all with more than 40 would
    look alike.
    """
    probe = scores[:probe_tokens]
    if by == "count":
        return count_peaks(probe, kappa=mask.kappa_start, statistic=mask.statistic, tau=mask.tau)
    return int(peaks(probe, kappa=mask.kappa_start, statistic=mask.statistic, tau=mask.tau).sum())


class Curriculum:
    """Draws the questions of a step and knows its kappa; every rank holds an equal copy and draws the same.

    Arguments:
        question_ids: all questions, distinct, in an order that is the same on all ranks and after a resume.
        config: with ``enabled: false`` questions are drawn uniformly without replacement and need no labels; kappa is
            scheduled all the same.
        mask: whose keys ``kappa_*`` are scheduled.
        origins: the source of each question, where there are several; ``buckets: within`` sorts each by itself.
        weights: shares of a draw by source; without them a question is drawn whatever its source.
        total_steps: S, the unit of ``t1`` and ``t2``.
    Raises ValueError for questions that are none or not distinct.
    """

    def __init__(
        self,
        question_ids: Sequence[str],
        config: CurriculumConfig,
        mask: MaskConfig,
        *,
        total_steps: int,
        seed: int,
        origins: Sequence[str] = (),
        weights: Mapping[str, float] | None = None,
    ) -> None:
        _check(len(question_ids) > 0, "there are no questions to draw from")
        _check(len(set(question_ids)) == len(question_ids), "question ids must be distinct")
        self.config, self.mask, self.enabled = config, mask, config.enabled
        self.question_ids, self.total_steps, self.seed = list(question_ids), total_steps, seed
        self._index = {question: i for i, question in enumerate(self.question_ids)}
        self.origins = np.array(origins or [""] * len(question_ids))  # (N,)
        names = list(weights or {})
        self.source = np.array([names.index(name) if names else 0 for name in self.origins])  # (N,)
        self.weights = np.array([*(weights or {"": 1.0}).values()])  # (S,)
        self.weights = self.weights / self.weights.sum()
        # State. Without labels everything lies in the first bucket. A cell is a bucket of a source.
        self.labels: dict[str, float] = {}
        self.buckets = np.zeros(len(self.question_ids), dtype=int)
        self.used = np.zeros(len(self.question_ids), dtype=bool)  # drawn in this epoch of its cell
        self.epochs = [0, 0, 0] * len(self.weights)
        self.draws = self.step = self.stalls = self.since_best = 0
        self.best: float | None = None
        self.earlier = list(self.epochs)  # as the step before ``step`` left them; logged before any checkpoint

    def set_labels(self, peaks: Mapping[str, float]) -> None:
        """Sort all questions into buckets by ``peaks``, N_peak by question. Raises ValueError if one has no label."""
        missing = [question for question in self.question_ids if question not in peaks]
        _check(not missing, f"{len(missing)} questions have no label, {missing[:1]} the first of them")
        self.relabel({question: peaks[question] for question in self.question_ids})

    def relabel(self, peaks: Mapping[str, float]) -> None:
        """Replace the labels of some questions by newer ones. One drawn in this epoch stays drawn in its new bucket."""
        unknown = [question for question in peaks if question not in self._index]
        _check(not unknown, f"{len(unknown)} labels belong to no question, {unknown[:1]} the first of them")
        self.labels |= peaks
        if self.enabled and len(self.labels) == len(self.question_ids):
            labels = np.array([self.labels[question] for question in self.question_ids], dtype=float)
            groups = self.origins if self.config.buckets == "within" else np.zeros_like(self.origins)
            for group in np.unique(groups):
                cuts: tuple[float, float] = self.config.cuts
                if self.config.bucket_by == "quantile":
                    first, second = np.quantile(labels[groups == group], self.config.quantiles)
                    cuts = (float(first), float(second))
                self.buckets[groups == group] = [bucket_of(label, cuts) for label in labels[groups == group]]

    @property
    def lopsided(self) -> str | None:
        """What to say if a bucket that is meant to be drawn from has under 5 % of the questions."""
        sizes = np.bincount(self.buckets, minlength=3)
        meant = np.maximum(self.config.start, self.config.end) > 0
        if not self.enabled or (sizes >= SMALL_BUCKET * sizes.sum())[meant].all():
            return None
        counts = ", ".join(f"{size} {name}" for size, name in zip(sizes, NAMES))
        by_count = "set curriculum.bucket_by: quantile, or other curriculum.cuts"
        ties = "too many questions have equally many peaks: set another curriculum.probe_tokens or mask.statistic"
        return (
            f"warning: the curriculum hardly tells questions apart: {counts}; "
            f"{ties if self.config.bucket_by == 'quantile' else by_count}"
        )

    def sample(self, step: int, n: int) -> list[str]:
        """The next n questions, distinct if there are n.

        A bucket of a source gives each of its questions once before any comes again. Shares follow the mixture of
        ``step`` times the weights of the sources on average, with less than one question rounded at random; what a
        bucket of a source cannot give, the others give in proportion. Raises RuntimeError before ``set_labels``.
        """
        if self.enabled and len(self.labels) < len(self.question_ids):
            raise RuntimeError("the curriculum needs set_labels() before it can sample")
        if n > len(self.question_ids):
            return self.sample(step, len(self.question_ids)) + self.sample(step, n - len(self.question_ids))
        if step != self.step:
            self.step, self.earlier = step, list(self.epochs)
        rng = np.random.default_rng([self.seed, 0, self.draws])
        self.draws += 1
        sizes = np.bincount(self.cells, minlength=3 * len(self.weights))
        shares = np.outer(self.weights, self.mixture(step) if self.enabled else (1.0, 0.0, 0.0)).ravel()
        chosen: list[int] = []
        for cell, count in enumerate(_allocate(n, sizes, shares, rng)):
            chosen += self._draw(cell, count)
        return [self.question_ids[i] for i in rng.permutation(chosen)]

    def bucket(self, question: str) -> str | None:
        """Name of the bucket that a question is in now; None where there are none."""
        return NAMES[self.buckets[self._index[question]]] if self.enabled else None

    @property
    def cells(self) -> np.ndarray:
        """Which bucket of which source each question is in. (N,)"""
        return 3 * self.source + self.buckets

    def clock(self, step: int) -> float:
        """``step`` plus 0.05 S for every stall, which can carry it to t2 S but not beyond."""
        return max(step, min(self.config.t2 * self.total_steps, step + STALL_ADVANCE * self.total_steps * self.stalls))

    def mixture(self, step: int) -> Mixture:
        now, config = self.clock(step), self.config
        return mixture(now, self.total_steps, t1=config.t1, t2=config.t2, start=config.start, end=config.end)

    def kappa(self, step: int) -> float:
        return kappa_at(
            self.clock(step) if self.mask.kappa_schedule == "literal" else step,
            start=self.mask.kappa_start,
            end=self.mask.kappa_end,
            decay_steps=self.mask.kappa_decay_steps or self.total_steps,
            stalls=self.stalls,
            schedule=self.mask.kappa_schedule,
        )

    @property
    def prefix(self) -> float:
        """Share of each completion that ``mask.rule: prefix`` trains on now: it grows with every stall."""
        return prefix_share(self.stalls, self.mask)

    def observe_validation(self, accuracy: float) -> bool:
        """Whether it is the best so far. ``stall_patience`` validations in a row without a new best are a stall."""
        if self.best is None or accuracy > self.best:
            self.best, self.since_best = accuracy, 0
            return True
        self.since_best += 1
        if self.since_best == self.config.stall_patience:
            self.stalls, self.since_best = self.stalls + 1, 0
        return False

    def metrics(self, step: int) -> dict[str, float]:
        """Where the curriculum stands at the step last sampled for, or at the one before: with ``rollout.async_depth:
        1`` the next batch is drawn by the time that a step is logged."""
        values: dict[str, float] = {"curriculum/clock": self.clock(step), "curriculum/stalls": self.stalls}
        epochs = self.epochs if step == self.step else self.earlier
        sizes = np.bincount(self.buckets, minlength=3)
        for bucket, name in enumerate(NAMES):
            if self.enabled:
                values[f"curriculum/share_{name}"] = self.mixture(step)[bucket]
            values[f"curriculum/questions_{name}"] = int(sizes[bucket])
            values[f"curriculum/epoch_{name}"] = max(epochs[bucket::3])  # of any source
        return values

    def state_dict(self) -> dict[str, Any]:
        """All that moves, ready for JSON."""
        return {
            "labels": dict(self.labels),
            "used": [self.question_ids[i] for i in np.flatnonzero(self.used)],
            "epochs": list(self.epochs),
            "draws": self.draws,
            "step": self.step,
            "stalls": self.stalls,
            "since_best": self.since_best,
            "best": self.best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError if the state speaks of questions that are not here."""
        self.labels = {}
        self.relabel(state["labels"])
        unknown = [question for question in state["used"] if question not in self._index]
        _check(not unknown, f"the saved curriculum has drawn {len(unknown)} questions that are not here: {unknown[:1]}")
        self.used[:] = False
        self.used[[self._index[question] for question in state["used"]]] = True
        self.epochs = list(state["epochs"])
        self.draws, self.step = state["draws"], state["step"]
        self.stalls, self.since_best, self.best = state["stalls"], state["since_best"], state["best"]

    def _draw(self, cell: int, count: int) -> list[int]:
        """``count`` distinct questions of a cell, going on to its next epoch where this one ends."""
        chosen = self._fresh(cell)[:count]
        self.used[chosen] = True
        if len(chosen) < count:
            self.used[self.cells == cell] = False
            self.epochs[cell] += 1
            taken = set(chosen)
            again = [i for i in self._fresh(cell) if i not in taken][: count - len(chosen)]
            self.used[again] = True
            chosen += again
        return chosen

    def _fresh(self, cell: int) -> list[int]:
        """Questions of a cell not drawn in this epoch, in the epoch's order, which exists for every question."""
        order = np.random.default_rng([self.seed, 1, cell, self.epochs[cell]]).permutation(len(self.question_ids))
        return [int(i) for i in order[(self.cells[order] == cell) & ~self.used[order]]]


def _allocate(n: int, sizes: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Split n over cells in proportion to ``shares`` (C,), none beyond its size; sizes sum to at least n."""
    counts = np.zeros(len(sizes), dtype=int)
    while (left := n - counts.sum()) > 0:
        room = sizes - counts
        weights = np.where(room > 0, shares, 0)
        if weights.sum() == 0:  # whoever has a share is empty: take from where there is room
            weights = room
        # Systematic sampling: count b is the share rounded up or down, and right on average.
        edges = np.floor(left * np.cumsum(weights) / weights.sum() + rng.random()).astype(int)
        edges[-1] = max(edges[-1], left)
        counts += np.minimum(np.diff(np.minimum(edges, left), prepend=0), room)
    return counts.tolist()


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
