"""How signals are judged, against definitions written out with loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from aipo.credit.table import (
    WRONG,
    Credit,
    auroc,
    average_precision,
    bootstrap,
    rank_correlation,
    resamples,
    share_caught,
    table,
    twins,
)

fractions = st.sampled_from([0.1, 0.2, 0.5, 1.0])
scores = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40)


@given(scores)
def test_auroc_counts_pairs(pairs: list[tuple[int, bool]]) -> None:
    score, label = np.array([s for s, _ in pairs], float), np.array([y for _, y in pairs])
    above = [(a > b) + 0.5 * (a == b) for a in score[label] for b in score[~label]]
    if above:
        assert auroc(score, label) == pytest.approx(np.mean(above))
    else:
        assert np.isnan(auroc(score, label))


@given(scores)
def test_average_precision_walks_down_the_thresholds(pairs: list[tuple[int, bool]]) -> None:
    score, label = np.array([s for s, _ in pairs], float), np.array([y for _, y in pairs])
    if not label.any():
        assert np.isnan(average_precision(score, label))
        return
    area, recall = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        taken = score >= threshold
        now = label[taken].sum() / label.sum()
        area += (now - recall) * label[taken].mean()
        recall = now
    assert average_precision(score, label) == pytest.approx(area)


def test_rank_correlation_is_spearmans() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(5, size=50).astype(float), draw.normal(size=50)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(np.ones(5), b[:5]) == 0.0


def test_share_caught_is_of_each_rollout() -> None:
    score = np.array([5.0, 1, 2, 3, 1, 9, 2, 3, 4, 0])
    value = np.array([1.0, 0, 0, 0, 0, 0, 3, 0, 0, 0])
    rollout = np.repeat([0, 1], 5)
    assert share_caught(score, value, rollout, 0.2) == pytest.approx(1 / 4)  # 5.0 and 9.0
    assert share_caught(score, value, rollout, 1.0) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=30), fractions)
def test_of_equal_scores_their_mean_is_caught(rows: list[tuple[int, int, int]], fraction: float) -> None:
    """What is caught on average when ties are broken at random, over draws of their order."""
    score, value, rollout = (np.array(column, float) for column in zip(*rows))
    draw, found = np.random.default_rng(0), []
    for _ in range(100):
        caught = 0.0
        for own in set(rollout):
            places = draw.permutation(np.flatnonzero(rollout == own))
            best = places[np.argsort(-score[places], kind="stable")]
            caught += value[best[: max(1, round(fraction * len(best)))]].sum()
        found.append(caught)
    error = np.std(found) / np.sqrt(100)
    expected = share_caught(score, value, rollout.astype(int), fraction) * value.sum()
    assert expected == pytest.approx(np.mean(found), abs=5 * error + 1e-9)


def credit(n: int = 200) -> Credit:
    draw = np.random.default_rng(1)
    delta = np.where(draw.random(n) < 0.2, draw.choice([-0.5, 0.5], n), draw.normal(size=n) * 0.02)
    return Credit(delta, np.full(n, 0.05), np.repeat(np.arange(n // 10), 10), np.repeat(np.arange(n // 20), 20))


def test_the_interval_is_around_the_value_and_narrows() -> None:
    from aipo.credit.table import STATISTICS

    few, many = credit(100), credit(2000)
    widths = []
    for known in (few, many):
        score = np.abs(known.delta) + np.random.default_rng(2).normal(size=len(known.delta)) * 0.5
        value, low, high = bootstrap(score, known, STATISTICS["AUROC"], list(resamples(known, 200)))
        assert low <= value <= high
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_the_difference_from_the_twin_is_of_the_same_questions() -> None:
    """Two that err alike differ surely, although the interval of each holds the other's value."""
    known = credit(400)
    draw = np.random.default_rng(4)
    common = np.abs(known.delta) + draw.normal(size=400) * 0.6
    signals = {"a": common + np.abs(known.delta) * 0.1, "a" + WRONG: common, "b": draw.random(400)}
    lines = twins(signals, known).splitlines()[2:]
    assert len(lines) == 1
    right, wrong, difference = lines[0].strip("| ").split(" | ")[1:]
    assert float(difference.split()[0]) == pytest.approx(float(right) - float(wrong), abs=0.011)
    assert difference.split("(")[1].startswith("+")


def test_the_table_puts_the_best_first_and_takes_unmeasured_tokens_for_the_lowest() -> None:
    known = credit()
    best, noise = np.abs(known.delta), np.random.default_rng(3).random(len(known.delta))
    unmeasured = np.where(known.decides, best, np.nan)
    text = table({"noise": noise, "best": best, "unmeasured": unmeasured}, known)
    lines = [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:]]
    assert set(lines[:2]) == {"best", "unmeasured"}
    assert lines[2] == "noise"
