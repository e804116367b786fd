"""How well signals find the tokens that change the value: AUROC, average precision, rank correlation, share caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from aipo.evaluation.results import markdown

Numbers = NDArray[np.float64]


def auroc(score: Numbers, label: NDArray[np.bool_]) -> float:
    """Probability that a positive scores above a negative, ties counting half: (n,), (n,). NaN with one class."""
    positives = int(label.sum())
    negatives = len(label) - positives
    if not positives or not negatives:
        return float("nan")
    return float((rankdata(score)[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(score: Numbers, label: NDArray[np.bool_]) -> float:
    """Area under precision over recall as a sum of steps, equal scores being one step: (n,), (n,)."""
    if not label.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    hits = label[order].cumsum()
    last = np.append(np.diff(score[order]) != 0, True)  # of equal scores
    precision, recall = hits[last] / (np.flatnonzero(last) + 1), hits[last] / hits[-1]
    return float((precision * np.diff(recall, prepend=0.0)).sum())


def rank_correlation(score: Numbers, value: Numbers) -> float:
    """Spearman's, with mean ranks for ties; 0 where one of them is constant."""
    a, b = rankdata(score), rankdata(value)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def share_caught(score: Numbers, value: Numbers, rollout: NDArray[np.int64], fraction: float) -> float:
    """Share of the sum of ``value`` at the round(fraction n) highest scores, at least one, of every rollout (n,).

    Of equal scores across that line as many count as there is room for, each with their mean: what it is expected to
    be if they are drawn.
    """
    order = np.lexsort((-score, rollout))  # of each rollout from its highest score down
    score, value, rollout = score[order], value[order], rollout[order]
    begins = np.diff(rollout, prepend=rollout[0] - 1) != 0  # (n,)
    first = np.flatnonzero(begins)  # of each rollout, (R,)
    start = np.flatnonzero(begins | (np.diff(score, prepend=np.inf) != 0))  # of each block of equal scores, (b,)
    size = np.diff(start, append=len(score))  # (b,)
    own = np.searchsorted(first, start, side="right") - 1  # its rollout, (b,)
    room = np.maximum(1, np.round(fraction * np.diff(first, append=len(score))))[own] - (start - first[own])  # (b,)
    caught = np.add.reduceat(value, start) * np.clip(room, 0, size) / size  # (b,)
    return float(caught.sum()) / max(float(value.sum()), 1e-12)


@dataclass(frozen=True)
class Credit:
    """What is known of n stretches of tokens: dV and its standard error, and whose they are, as numbers from 0."""

    delta: Numbers
    error: Numbers
    rollout: NDArray[np.int64]
    question: NDArray[np.int64]

    @property
    def decides(self) -> NDArray[np.bool_]:
        return np.abs(self.delta) > 2 * self.error

    def take(self, rows: NDArray[np.int64], copy: NDArray[np.int64]) -> Credit:
        """Some rows; those drawn twice are of different rollouts, by the number of the ``copy``."""
        rollout = self.rollout[rows] + copy * (int(self.rollout.max()) + 1)
        return Credit(self.delta[rows], self.error[rows], rollout, self.question[rows])


Statistic = Callable[[Numbers, Credit], float]


def _sign(score: Numbers, credit: Credit) -> float:
    rows = credit.decides
    return auroc(score[rows], credit.delta[rows] > 0)


STATISTICS: dict[str, Statistic] = {
    "AUROC": lambda score, credit: auroc(score, credit.decides),
    "AUPRC": lambda score, credit: average_precision(score, credit.decides),
    "rank correlation": lambda score, credit: rank_correlation(score, np.abs(credit.delta)),
    "top 10 %": lambda score, credit: share_caught(score, np.abs(credit.delta), credit.rollout, 0.1),
    "top 20 %": lambda score, credit: share_caught(score, np.abs(credit.delta), credit.rollout, 0.2),
    "AUROC of the sign": _sign,
}


RESAMPLES = 200
RESAMPLES_OF_TWINS = 2000  # whether an interval has 0 is read off these
Resample = tuple[NDArray[np.int64], Credit]  # rows of the questions drawn, and what is known of them


def resamples(credit: Credit, count: int, *, seed: int = 0) -> Iterator[Resample]:
    """Questions drawn with replacement, as many as there are."""
    draw = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(credit.question == q) for q in range(int(credit.question.max()) + 1)]
    for _ in range(count):
        drawn = draw.integers(len(rows_of), size=len(rows_of))
        rows = np.concatenate([rows_of[q] for q in drawn])
        copy = np.repeat(np.arange(len(drawn)), [len(rows_of[q]) for q in drawn])
        yield rows, credit.take(rows, copy)


def bootstrap(
    score: Numbers, credit: Credit, statistic: Statistic, drawn: Sequence[Resample]
) -> tuple[float, float, float]:
    """The statistic and its 2.5 and 97.5 % quantiles over resamples; one in which it is not defined is left out."""
    found = [statistic(score[rows], known) for rows, known in drawn]
    kept = [value for value in found if value == value]
    low, high = np.quantile(kept, [0.025, 0.975]) if kept else (np.nan, np.nan)
    return statistic(score, credit), float(low), float(high)


WRONG = " (wrong gold)"  # behind the name of a signal that has another question's gold


def filled(values: Numbers) -> Numbers:
    """With a token that a signal does not measure as its lowest."""
    finite = values[np.isfinite(values)]
    return np.where(np.isfinite(values), values, finite.min() if len(finite) else 0.0)


def twins(signals: dict[str, Numbers], credit: Credit) -> str:
    """AUROC with the right gold, with the wrong one, and their difference on the same resamples, largest first."""
    pairs = {
        name: (filled(signals[name]), filled(signals[name + WRONG])) for name in signals if name + WRONG in signals
    }

    def both(rows: slice | NDArray[np.int64], decides: NDArray[np.bool_]) -> Numbers:
        return np.array([[auroc(score[rows], decides) for score in pair] for pair in pairs.values()])

    values = both(slice(None), credit.decides)  # (n, 2)
    drawn = np.stack([both(rows, own.decides) for rows, own in resamples(credit, RESAMPLES_OF_TWINS)])  # (r, n, 2)
    low, high = np.nanquantile(drawn[..., 0] - drawn[..., 1], [0.025, 0.975], axis=0)  # (n,) each
    cells = []
    for i, name in enumerate(pairs):
        right, wrong = values[i]
        difference = f"{right - wrong:+.2f} ({low[i]:+.2f} to {high[i]:+.2f})"
        cells.append((right - wrong, [name, f"{right:.2f}", f"{wrong:.2f}", difference]))
    columns = ["signal", "right gold", "wrong gold", "difference"]
    return markdown(columns, [cell for _, cell in sorted(cells, key=lambda each: -each[0])])


def table(signals: dict[str, Numbers], credit: Credit) -> str:
    """A line a signal, best AUROC first. A token that a signal does not measure counts as its lowest."""
    cells, drawn = [], list(resamples(credit, RESAMPLES))
    for name, values in signals.items():
        score = filled(values)
        found = [bootstrap(score, credit, statistic, drawn) for statistic in STATISTICS.values()]
        order = found[0][0] if found[0][0] == found[0][0] else -1.0
        cells.append((order, [name, *(f"{value:.2f} ({low:.2f}–{high:.2f})" for value, low, high in found)]))
    return markdown(["signal", *STATISTICS], [cell for _, cell in sorted(cells, key=lambda each: -each[0])])
