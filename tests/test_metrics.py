import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aipo.metrics import (
    accuracy_summary,
    avg_at_k,
    bootstrap_interval,
    distinct,
    diversity,
    error_bounds,
    maj_at_k,
    paired_bootstrap,
    pass_at_k,
    repetition,
    self_bleu,
    training_efficiency,
)

tables = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=4)


def test_avg_at_k_is_a_mean_of_means():
    assert avg_at_k([[1, 0, 0, 0], [1, 1]]) == pytest.approx((0.25 + 1.0) / 2)  # not 3/6
    assert avg_at_k(torch.tensor([[True, False], [True, True]])) == pytest.approx(0.75)


def test_pass_at_k_by_hand():
    # n = 4, c = 1: C(3, 2) / C(4, 2) = 3 / 6 of the pairs miss it.
    assert pass_at_k([[1, 0, 0, 0]], 2) == pytest.approx(0.5)
    assert pass_at_k([[1, 0, 0, 0], [0, 0, 0, 0]], 4) == pytest.approx(0.5)


@given(tables, st.integers(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(table, k):
    if k > min(map(len, table)):
        with pytest.raises(ValueError, match="fewest samples"):
            pass_at_k(table, k)
        return
    slow = statistics.mean(statistics.mean(any(s) for s in itertools.combinations(row, k)) for row in table)
    assert pass_at_k(table, k) == pytest.approx(slow)


def test_maj_at_k_by_hand():
    assert maj_at_k([["7", "7", "8"]], [[1, 1, 0]]) == 1.0
    assert maj_at_k([["7", "8", "8"]], [[1, 0, 0]]) == 0.0
    assert maj_at_k([["7", "8"]], [[1, 0]]) == 0.5  # a tie is shared
    assert maj_at_k([["7", "8", "9"]], [[1, 0, 0]]) == pytest.approx(1 / 3)
    assert maj_at_k([[None, None, "7"]], [[0, 0, 1]]) == 1.0  # no answer, no vote
    assert maj_at_k([[None, None]], [[0, 0]]) == 0.0
    assert maj_at_k([["7", "8"], ["1", "1"]], [[1, 0], [1, 1]]) == 0.75


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7), min_size=1, max_size=4))
def test_maj_at_k_against_a_vote_count(answers):
    """With 'a' the right answer everywhere."""
    correct = [[answer == "a" for answer in row] for row in answers]
    expected = 0.0
    for row in answers:
        counts = {letter: row.count(letter) for letter in "abc"}
        top = [letter for letter in "abc" if counts[letter] == max(counts.values()) > 0]
        expected += ("a" in top) / len(top) if top else 0.0
    assert maj_at_k(answers, correct) == pytest.approx(expected / len(answers))


@pytest.mark.parametrize(("mag", "otf", "tes"), [(12.10, 22.15, 54.6), (14.91, 21.07, 70.8), (18.02, 19.54, 92.2)])
def test_training_efficiency_follows_the_paper(mag, otf, tes):
    assert training_efficiency(mag, otf) == pytest.approx(tes, abs=0.05)


@pytest.mark.parametrize("otf", [0.0, -1.0, 101.0, float("nan")])
def test_training_efficiency_refuses_a_share_that_is_none(otf):
    with pytest.raises(ValueError, match="percentage"):
        training_efficiency(10, otf)


def test_bootstrap_is_seeded_and_matches_the_normal_interval():
    scores = [0.0] * 60 + [1.0] * 40
    low, high = bootstrap_interval(scores, seed=3)
    assert (low, high) == bootstrap_interval(scores, seed=3)
    half_width = 1.96 * (0.4 * 0.6 / 100) ** 0.5
    assert low == pytest.approx(0.4 - half_width, abs=0.015)
    assert high == pytest.approx(0.4 + half_width, abs=0.015)


def test_bootstrap_against_all_resamples():
    """Three problems have 27 equally likely resamples; their quantiles are what the bootstrap approaches."""
    scores = [0.0, 0.3, 1.0]
    means = [sum(draw) / 3 for draw in itertools.product(scores, repeat=3)]
    low, high = bootstrap_interval(scores, seed=0, level=0.5)
    # A quarter of the mass lies at or below each end: the ends are values of the exact distribution.
    assert sum(m <= low + 1e-9 for m in means) / 27 >= 0.25 > sum(m < low - 1e-9 for m in means) / 27
    assert sum(m <= high + 1e-9 for m in means) / 27 >= 0.75 > sum(m < high - 1e-9 for m in means) / 27


def test_resamples_of_many_problems_are_drawn_in_parts():
    """Of 130 problems a million numbers hold 7,692 resamples: two parts, which are those of one draw of all."""
    scores = np.random.default_rng(7).random(130)
    drawn = np.random.default_rng(3).integers(130, size=(10_000, 130))
    means = [statistics.fmean(scores[row]) for row in drawn]
    assert bootstrap_interval(scores, seed=3, level=0.9) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])))


def test_a_wider_level_is_a_wider_interval():
    scores = [0, 0.25, 0.5, 1, 1, 0.75]
    inner, outer = (bootstrap_interval(scores, seed=0, level=level) for level in (0.8, 0.99))
    assert outer[0] < inner[0] < inner[1] < outer[1]


def test_bootstrap_of_equal_scores_has_no_width():
    assert bootstrap_interval([0.25] * 5, seed=0) == (0.25, 0.25)


def test_accuracy_summary():
    accuracy = accuracy_summary([[1, 0], [1, 1], [0, 0]], seed=1)
    assert accuracy.value == pytest.approx(0.5)
    assert accuracy.low < 0.5 < accuracy.high
    assert (accuracy.problems, accuracy.samples) == (3, 6)
    assert str(accuracy).startswith("50.0 % [")


def test_empty_input_is_an_error():
    no_problems: list[list[int]] = []
    no_samples: list[list[int]] = [[1], []]
    for empty in (no_problems, no_samples):
        with pytest.raises(ValueError, match="at least one"):
            avg_at_k(empty)
    with pytest.raises(ValueError, match="same problems"):
        maj_at_k([["7"]], [[1, 0]])


def test_paired_bootstrap_against_all_resamples():
    a, b = [0.0, 0.5, 1.0, 0.25], [0.5, 0.75, 0.5, 1.0]
    differences = [right - left for left, right in zip(a, b)]
    # the bootstrap distribution itself: all 4^4 resamples, equally likely
    means = sorted(statistics.mean(draw) for draw in itertools.product(differences, repeat=4))
    found = paired_bootstrap(a, b, resamples=40_000)
    assert found.value == pytest.approx(statistics.mean(differences))
    assert (found.a, found.b, found.problems) == (pytest.approx(0.4375), pytest.approx(0.6875), 4)
    assert found.low == pytest.approx(means[int(0.025 * 256)], abs=0.07)
    assert found.high == pytest.approx(means[int(0.975 * 256)], abs=0.07)
    exact = 2 * min(sum(m <= 0 for m in means), sum(m >= 0 for m in means)) / 256
    assert found.p == pytest.approx(exact, abs=0.01)
    assert not found.real


def test_paired_bootstrap_sees_what_unpaired_intervals_hide():
    # problems differ widely, the two sides by little but always the same way
    a = [i / 20 for i in range(20)]
    b = [score + 0.02 + 0.01 * (i % 2) for i, score in enumerate(a)]
    found = paired_bootstrap(a, b)
    assert found.real
    assert found.p == 2 / 10_001  # no resample reaches 0, which is not to say that none would
    assert bootstrap_interval(a, 0)[1] > bootstrap_interval(b, 0)[0]
    swapped = paired_bootstrap(b, a)
    assert (swapped.low, swapped.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_paired_bootstrap_of_equals_and_of_nothing():
    same = paired_bootstrap([0.3, 0.7], [0.3, 0.7])
    assert (same.value, same.low, same.high, same.p, same.real) == (0, 0, 0, 1, False)
    for bad in (([], []), ([1.0], [1.0, 0.0])):
        with pytest.raises(ValueError, match="score of each problem"):
            paired_bootstrap(*bad)


@settings(max_examples=200, deadline=None)
@given(st.integers(3, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_the_best_guess_errs_within_the_bounds(answers: int, states: int, seed: int) -> None:
    """Of any joint distribution of answer and hidden state: p_e = 1 - sum_h max_y p(y, h)."""
    joint = np.random.default_rng(seed).dirichlet(np.full(answers * states, 0.3)).reshape(answers, states)

    def entropy(p: np.ndarray) -> float:
        p = p[p > 0]
        return float(-(p * np.log2(p)).sum())

    answer, conditional = entropy(joint.sum(1)), entropy(joint.ravel()) - entropy(joint.sum(0))
    low, high = error_bounds(answer, max(answer - conditional, 0.0), answers)
    error = 1 - joint.max(0).sum()
    assert low - 1e-9 <= error <= high + 1e-9


def test_bounds_by_hand() -> None:
    assert error_bounds(3.0, 0.0, 8) == pytest.approx((2 / math.log2(7), 1.0))
    assert error_bounds(3.0, 3.0, 8) == (0.0, 0.0)
    for bad in ((1.0, 0.5, 2), (3.0, 3.1, 8), (4.0, 0.0, 8)):
        with pytest.raises(ValueError, match="3 answers or more"):
            error_bounds(*bad)


# -- diversity


def test_diversity_by_hand():
    words = [[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]]
    assert distinct(words, 1) == pytest.approx(5 / 10)
    assert distinct(words, 4) == pytest.approx(4 / 4)
    assert distinct(words, 2) == pytest.approx(5 / 8)  # 12, 21, 23, 34, 45
    assert repetition(words, 2) == pytest.approx((2 / 4 + 0) / 2)
    assert math.isnan(distinct([[1]], 2))
    assert math.isnan(repetition([[1], []], 2))
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    assert self_bleu([[1, 2, 3, 4, 5], [6, 7, 8, 9]]) == 0
    # "1 2 3 4" against "1 2 3 4 5": all n-grams shared, but shorter: e^(1 - 5/4). The other way: 4/5, 3/4, 2/3, 1/2
    expected = (math.exp(-1 / 4) + (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)) / 2
    assert self_bleu([[1, 2, 3, 4], [1, 2, 3, 4, 5]]) == pytest.approx(expected)
    assert self_bleu([[1, 1, 1, 1], [1, 1, 2, 3]], order=1) == pytest.approx((2 / 4 + 2 / 4) / 2)  # clipped
    assert self_bleu([[1, 2], [1, 2]]) == pytest.approx(1)  # of the orders that there are
    assert math.isnan(self_bleu([[1, 2], []]))
    assert diversity([[1, 2, 3], [1, 2, 3, 4]]) == {}
    assert diversity(words)["distinct_1"] == pytest.approx(5 / 10)


def slow_bleu(said: list[list[int]], who: int) -> float:
    """Papineni et al. 2002, eq. 1 to 3, of one completion against all others."""
    candidate, others = said[who], said[:who] + said[who + 1 :]
    logs = []
    for n in range(1, 5):
        grams = [candidate[i : i + n] for i in range(len(candidate) - n + 1)]
        clipped = 0
        for gram in {tuple(gram) for gram in grams}:
            often = max(sum(other[i : i + n] == list(gram) for i in range(len(other) - n + 1)) for other in others)
            clipped += min(sum(each == list(gram) for each in grams), often)
        if grams:
            logs.append(math.log(clipped / len(grams)) if clipped else -math.inf)
    closest = sorted(others, key=lambda other: (abs(len(other) - len(candidate)), len(other)))[0]
    brevity = 1.0 if len(candidate) > len(closest) else math.exp(1 - len(closest) / len(candidate))
    return brevity * math.exp(sum(logs) / len(logs))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=2, max_size=5))
def test_self_bleu_against_loops(said):
    assert self_bleu(said) == pytest.approx(statistics.mean(slow_bleu(said, i) for i in range(len(said))))


@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=5), st.integers(1, 4))
def test_distinct_and_repetition_against_loops(said, n):
    every = [[row[i : i + n] for i in range(len(row) - n + 1)] for row in said]

    def share(grams):
        return sum(gram not in grams[:i] for i, gram in enumerate(grams)) / len(grams)

    together = [gram for grams in every for gram in grams]
    if not together:
        assert math.isnan(distinct(said, n))
        assert math.isnan(repetition(said, n))
        return
    assert distinct(said, n) == pytest.approx(share(together))
    assert repetition(said, n) == pytest.approx(statistics.mean(1 - share(grams) for grams in every if grams))
