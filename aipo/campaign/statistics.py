"""What a few seeds can say: paired tests against a control, corrected for how many there are, and how many it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, norm, t, ttest_1samp

from aipo.metrics import bootstrap_interval

LEVEL = 0.05
POWER = 0.8
MOST = 1000  # seeds that nobody will run


@dataclass(frozen=True)
class Comparison:
    """A condition against the control, on the seeds of both. Differences in the unit of the values."""

    difference: float
    low: float  # 95 % bootstrap interval over seeds
    high: float
    p: float  # two-sided, t-test paired by seed; NaN with fewer than two seeds or without any spread
    adjusted: float  # by Holm
    seeds: int
    needed: int | None  # seeds at which the difference would be told apart; None: none needed, or not to be said

    @property
    def told_apart(self) -> bool:
        return self.adjusted < LEVEL


def compare(values: Mapping[str, Mapping[int, float]], control: str) -> dict[str, Comparison]:
    """All conditions against ``control``, but for those without a common seed; ``values``: condition -> seed -> figure.

    Runs of one seed share the first samples, the order of questions and the held-out draws: pairs differ by less.
    """
    base = values.get(control, {})
    differences = {
        name: [own[seed] - base[seed] for seed in sorted(own) if seed in base]
        for name, own in values.items()
        if name != control
    }
    differences = {name: found for name, found in differences.items() if found}
    p = {name: paired_p(found) for name, found in differences.items()}
    adjusted = dict(zip(p, holm(list(p.values()))))
    tests = sum(math.isfinite(each) for each in p.values())
    made = {}
    for name, found in differences.items():
        low, high = bootstrap_interval(found, 0)
        needed = None if adjusted[name] < LEVEL else seeds_needed(found, level=LEVEL / max(tests, 1))
        made[name] = Comparison(float(np.mean(found)), low, high, p[name], adjusted[name], len(found), needed)
    return made


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of Student's t-test that paired differences are 0 on average. NaN where they have no spread."""
    if len(differences) < 2 or np.ptp(differences) <= 1e-9 * max(np.max(np.abs(differences)), 1e-300):
        return math.nan
    return float(ttest_1samp(differences, 0).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): below a level, all such rejections together err with at most that probability.

    The i-th smallest of m becomes max over j <= i of (m - j + 1) p_j, at most 1. A NaN is no test and stays NaN.
    """
    order = sorted((i for i in range(len(p)) if math.isfinite(p[i])), key=lambda i: p[i])
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def power(effect: float, seeds: int, level: float = LEVEL) -> float:
    """Probability that a paired t-test with so many seeds is significant, for a mean of ``effect`` deviations.

    t = (Z + shift) / sqrt(V / f) with Z normal, V chi-squared: averaged over V, since scipy's noncentral t gives NaN
    for large shifts.
    """
    freedom, shift = seeds - 1, abs(effect) * math.sqrt(seeds)
    critical = t.ppf(1 - level / 2, freedom)
    spread = np.sqrt(chi2.ppf((np.arange(2000) + 0.5) / 2000, freedom) / freedom)  # (2000,)
    return float(np.mean(norm.cdf(shift - critical * spread) + norm.cdf(-shift - critical * spread)))


def seeds_needed(differences: Sequence[float], *, level: float = LEVEL, target: float = POWER) -> int | None:
    """Fewest seeds with which a difference like this one would be shown with probability ``target``; None above 1,000.

    It takes mean and deviation of these differences for the true ones, which from three seeds is a rough guess.
    """
    if math.isnan(paired_p(differences)):
        return None
    effect = abs(float(np.mean(differences))) / float(np.std(differences, ddof=1))
    if effect == 0 or power(effect, MOST, level) < target:
        return None
    low, high = 1, MOST  # power grows with seeds: the answer lies above low, up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, middle, level) >= target else (middle, high)
    return high
