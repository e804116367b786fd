"""The statistics of a campaign against independent references: scipy, the definition of closed testing, simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import nct, t, ttest_rel

from aipo.campaign.statistics import compare, holm, paired_p, power, seeds_needed

P = st.lists(st.floats(1e-6, 1), min_size=1, max_size=6)


def closed_testing(p: list[float]) -> list[float]:
    """Holm by where it comes from: a hypothesis falls if every intersection with it falls by Bonferroni."""
    adjusted = []
    for i in range(len(p)):
        sets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), n) if i in s]
        adjusted.append(max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets))
    return adjusted


@pytest.mark.slow
@given(P)
def test_holm_is_closed_testing(p: list[float]) -> None:
    assert holm(p) == pytest.approx(closed_testing(p))


def test_a_test_that_could_not_be_made_counts_for_nothing() -> None:
    assert holm([0.01, math.nan, 0.04])[::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(holm([0.01, math.nan])[1])


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=3, max_size=8))
def test_the_paired_test_is_scipys(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs)
    differences = [x - y for x, y in pairs]
    if np.std(differences) > 1e-3:
        assert paired_p(differences) == pytest.approx(float(ttest_rel(a, b).pvalue), rel=1e-6)


@pytest.mark.parametrize("differences", [[1.0], [2.0, 2.0, 2.0], [0.0, 0.0]])
def test_without_spread_nothing_is_shown(differences: list[float]) -> None:
    assert math.isnan(paired_p(differences))
    assert seeds_needed(differences) is None


@pytest.mark.parametrize(
    ("effect", "seeds", "level"), [(0.5, 5, 0.05), (1.0, 8, 0.01), (1.5, 3, 0.003), (-4.0, 2, 0.05)]
)
def test_power_is_that_of_the_noncentral_t(effect: float, seeds: int, level: float) -> None:
    critical, shift = t.ppf(1 - level / 2, seeds - 1), effect * math.sqrt(seeds)
    expected = nct.sf(critical, seeds - 1, shift) + nct.cdf(-critical, seeds - 1, shift)
    assert power(effect, seeds, level) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("differences", [[1.0, 2.0, 3.5], [0.5, -0.4, 1.0], [5.0, 4.0, 7.0, 6.0]])
def test_needed_seeds_are_the_fewest(differences: list[float]) -> None:
    found = seeds_needed(differences)
    assert found is not None
    effect = np.mean(differences) / np.std(differences, ddof=1)
    assert found == next(n for n in range(2, 1001) if power(float(effect), n) >= 0.8)


def test_more_than_anybody_runs_is_said_so() -> None:
    assert seeds_needed([-1.0, 1.0, 0.0001]) is None


def test_a_difference_is_one_that_every_seed_shows() -> None:
    """Seeds start 20 points apart, which only pairing takes out; "noisy" is better on average, but not always."""
    values = {
        "random": {0: 20.0, 1: 30.0, 2: 40.0},
        "better": {2: 50.0, 0: 30.1, 1: 40.4},
        "noisy": {0: 35.0, 1: 28.0, 2: 55.0},
        "elsewhere": {7: 90.0},
    }
    made = compare(values, "random")
    assert set(made) == {"better", "noisy"}
    better, noisy = made["better"], made["noisy"]
    assert better.told_apart
    assert better.difference == pytest.approx((10.1 + 10.4 + 10) / 3)
    assert better.adjusted == pytest.approx(2 * better.p)
    assert better.low <= better.difference <= better.high
    assert not noisy.told_apart
    # at the level that each of two comparisons has, of which a single one would need fewer
    assert noisy.needed == seeds_needed([15.0, -2.0, 15.0], level=0.025)
    assert noisy.needed != seeds_needed([15.0, -2.0, 15.0])
    assert compare({"a": {0: 1.0}}, "gone") == {}
