"""Advantages by hand and against loops (tests/reference.py)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aipo.advantage import (
    QUADRANTS,
    assign,
    blend,
    constant_groups,
    effective_token_ratio,
    entropy_quadrants,
    gini,
    group_advantages,
    information_advantages,
    reallocate_by_entropy,
    subtract_token_baseline,
    weight_tokens,
    zscore,
)
from aipo.config.sections import AdvantageConfig
from aipo.problems.datasets import Problem
from aipo.rollout.base import Completion
from aipo.rollouts import Rollouts
from tests import reference

REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5])  # two groups of four: means 0.25 and 0.75


def test_group_baseline_by_hand() -> None:
    expected = [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.25, -0.25]
    assert group_advantages(REWARDS, 4).tolist() == expected


def test_batch_baseline_by_hand() -> None:
    assert group_advantages(REWARDS, 4, baseline="batch").tolist() == [0.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.0, 0.0]


def test_leave_one_out_by_hand() -> None:
    # the others of the first group average 0, 1/3, 1/3, 1/3
    expected = [1, -1 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -1 / 3, -1 / 3]
    advantages = group_advantages(REWARDS, 4, baseline="leave_one_out")
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_std_by_hand() -> None:
    # sample standard deviations: sqrt((0.75^2 + 3 * 0.25^2) / 3) = 0.5, and sqrt(4 * 0.25^2 / 3) = 0.288675
    a = 0.25 / (math.sqrt(1 / 12) + 1e-6)
    expected = [0.75 / 0.500001, *[-0.25 / 0.500001] * 3, a, a, -a, -a]
    torch.testing.assert_close(group_advantages(REWARDS, 4, normalize="std"), torch.tensor(expected))


def test_maxrl_by_hand() -> None:
    # means 1/4 and 3/4: what is rare among the four counts four times
    third = 1 / 3
    expected = [3, -1, -1, -1, third, third, -third, -third]
    torch.testing.assert_close(group_advantages(REWARDS, 4, normalize="mean"), torch.tensor(expected))
    assert group_advantages(torch.tensor([0.0, -1.0]), 2, normalize="mean").tolist() == [0, 0]  # a mean below 0


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_maxrl_climbs_a_truncated_likelihood(n: int, p: float) -> None:
    """One coin of chance p = sigmoid(theta) for an answer: the exact mean of 1/n sum A d log pi over all outcomes of n
    tosses is the gradient of sum_{k<n} pass@k / k with pass@k = 1 - (1 - p)^k, which goes to that of log p."""
    mean = 0.0
    for right in range(n + 1):
        rewards = torch.tensor([1.0] * right + [0.0] * (n - right))
        scores = torch.tensor([1 - p] * right + [-p] * (n - right))  # d log pi / d theta
        chance = math.comb(n, right) * p**right * (1 - p) ** (n - right)
        mean += chance * float((group_advantages(rewards, n, normalize="mean") * scores).sum()) / n
    slope = p * (1 - p)  # dp / d theta
    assert mean == pytest.approx(slope * sum((1 - p) ** (k - 1) for k in range(1, n)), rel=1e-5, abs=1e-7)
    assert abs(mean) <= 1 - p + 1e-6  # d log p / d theta


@pytest.mark.parametrize("baseline", ["group", "batch", "leave_one_out"])
@pytest.mark.parametrize("normalize", ["none", "std", "mean"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7])
def test_equal_rewards_give_exactly_zero(baseline: str, normalize: str, reward: float) -> None:
    advantages = group_advantages(torch.full((14,), reward), 7, baseline=baseline, normalize=normalize)
    assert advantages.tolist() == [0.0] * 14


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("normalize", ["none", "std"])
def test_a_lone_sample_has_no_advantage(baseline: str, normalize: str) -> None:
    assert group_advantages(torch.tensor([1.0, 0.0]), 1, baseline=baseline, normalize=normalize).tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["group", "batch", "leave_one_out"]), st.sampled_from(["none", "std", "mean"]))
def test_against_loops(data: st.DataObject, baseline: str, normalize: str) -> None:
    size = data.draw(st.integers(1, 5))
    count = size * data.draw(st.integers(1, 4))
    tenths = st.integers(0, 10).map(lambda r: r / 10)
    rewards = data.draw(st.lists(tenths, min_size=count, max_size=count))
    expected = reference.group_advantages(rewards, size, baseline, normalize)
    actual = group_advantages(torch.tensor(rewards), size, baseline=baseline, normalize=normalize)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    if baseline == "group":
        assert actual.reshape(-1, size).sum(1).abs().max() < 1e-3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="group_size 3 does not divide the 8"):
        group_advantages(REWARDS, 3)
    with pytest.raises(ValueError, match="group_size 0"):
        group_advantages(REWARDS, 0)
    with pytest.raises(ValueError, match="median"):
        group_advantages(REWARDS, 4, baseline="median")
    with pytest.raises(ValueError, match="range"):
        group_advantages(REWARDS, 4, normalize="range")


def test_constant_groups_have_a_tolerance() -> None:
    groups = torch.tensor([[0.1, 0.1, 0.1], [0.1, 0.1 + 1e-7, 0.1], [0.1, 0.1001, 0.1]])
    assert constant_groups(groups).tolist() == [True, True, False]


NAN = float("nan")


@pytest.mark.parametrize("normalize", ["none", "std", "mean"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch"])
def test_what_has_no_verdict_is_as_if_it_had_not_been_drawn(baseline: str, normalize: str) -> None:
    rewards = [[1.0, NAN, 0.0, 0.5], [NAN, 1.0, NAN, NAN], [NAN] * 4, [0.2, 0.4, 0.2, 0.9]]
    found = group_advantages(torch.tensor(rewards).flatten(), 4, baseline=baseline, normalize=normalize)
    judged = [[r for r in row if r == r] for row in rewards]
    groups = [[r for row in judged for r in row]] if baseline == "batch" else judged
    alone = [a for row in groups if row for a in reference.group_advantages(row, len(row), baseline, normalize)]
    missing = torch.tensor(rewards).flatten().isnan()
    assert found[missing].tolist() == [0.0] * int(missing.sum())
    torch.testing.assert_close(found[~missing], torch.tensor(alone), rtol=1e-4, atol=1e-5)


def judged(rewards: Tensor, correct: Tensor | None = None) -> Rollouts:
    """Groups of four, of which the length limit cut the last."""
    questions = len(rewards) // 4
    return Rollouts(
        problems=[Problem(str(q), "?", "1") for q in range(questions)],
        prompts=[[1]] * questions,
        completions=[Completion([1], [0.0], end) for end in ["stop", "stop", "stop", "length"] * questions],
        group_size=4,
        ids=torch.arange(len(rewards)),
        rewards=rewards,
        correct=rewards == 1 if correct is None else correct,
    )


@pytest.mark.parametrize("normalize", ["none", "std", "mean"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch"])
def test_an_update_has_the_advantages_that_its_config_asks_for(baseline: Any, normalize: Any) -> None:
    rollouts = judged(REWARDS)
    assign(rollouts, AdvantageConfig(baseline=baseline, normalize=normalize))
    expected = reference.group_advantages(REWARDS.tolist(), 4, baseline, normalize)
    torch.testing.assert_close(rollouts.advantages, torch.tensor(expected))
    assert rollouts.used.all()


@pytest.mark.parametrize(
    ("drop", "truncated", "used"),
    [
        ("none", "train", [1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0]),
        ("reward", "train", [1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]),  # the lone one of the last group is constant
        ("correctness", "train", [1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),  # lengths alone make the second group vary
        ("none", "mask", [1, 0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0]),
    ],
)
def test_which_rollouts_an_update_reads(drop: Any, truncated: str, used: list[int]) -> None:
    rewards = torch.tensor([0.9, NAN, 0.0, 0.1, 0.1, 0.0, 0.1, 0.0, NAN, 0.1, NAN, NAN])
    rollouts = judged(rewards, correct=torch.tensor([True] + [False] * 11))
    assign(rollouts, AdvantageConfig(drop_constant_groups=drop), truncated=truncated)
    assert rollouts.used.int().tolist() == used
    assert rollouts.advantages[9] == 0
    assert rollouts.advantages[3] == pytest.approx(0.1 - 1 / 3)  # a masked one counts in its group's mean


# --- blend --------------------------------------------------------------------------------------------------------

# z of 1, 3 is -1, 1; of 2, 2, 5 it is -1, -1, 2 over sqrt(2); what lies behind a row's length is not read
SCORES = torch.tensor([[1.0, 3.0, float("nan")], [2.0, 2.0, 5.0]])
LENGTHS = torch.tensor([2, 3])
ADVANTAGES = torch.tensor([0.5, -1.0])


def test_blend_by_hand() -> None:
    r = math.sqrt(0.5)
    additive = blend(ADVANTAGES, SCORES, LENGTHS, how="additive", weight=0.1)
    torch.testing.assert_close(additive[0, :2], torch.tensor([0.4, 0.6]))
    torch.testing.assert_close(additive[1], torch.tensor([-1 - 0.1 * r, -1 - 0.1 * r, -1 + 0.2 * r]))
    multiplicative = blend(ADVANTAGES, SCORES, LENGTHS, how="multiplicative", weight=0.1)
    torch.testing.assert_close(multiplicative[0, :2], torch.tensor([0.45, 0.55]))
    torch.testing.assert_close(multiplicative[1], torch.tensor([-1 + 0.1 * r, -1 + 0.1 * r, -1 - 0.2 * r]))
    assert additive.isfinite().all()
    assert blend(ADVANTAGES, SCORES, LENGTHS, how="none", weight=0.1) is ADVANTAGES
    with pytest.raises(ValueError, match="divided"):
        blend(ADVANTAGES, SCORES, LENGTHS, how="divided", weight=0.1)


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e4, 1e4, width=32), st.integers(0, 40), st.sampled_from(["additive", "multiplicative"]))
def test_constant_scores_change_nothing(score: float, length: int, how: str) -> None:
    scores = torch.full((1, 50), score)
    out = blend(torch.tensor([0.7]), scores, torch.tensor([length]), how=how, weight=0.5)
    assert torch.equal(out, torch.full((1, 50), 0.7))


def test_rounding_noise_is_no_variation() -> None:
    scores = torch.tensor([[0.1, 0.1 + 1e-8, 0.1, 0.1 - 1e-8]])
    assert len(scores.unique()) > 1
    out = blend(torch.tensor([0.7]), scores, torch.tensor([4]), how="additive", weight=0.5)
    assert torch.equal(out, torch.full((1, 4), 0.7))


# --- rules of single tokens, against loops --------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def ragged(seed: int, rows: int, width: int, *, constant: bool = False, garbage: float = NAN) -> dict[str, Tensor]:
    """Rows of 0..width tokens, ``garbage`` behind them; the first advantage is 0, as a constant group's."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (rows,), generator=random)
    inside = torch.arange(width) < lengths[:, None]

    def tokens() -> Tensor:
        values = torch.randn(rows, width, generator=random, dtype=torch.float64)
        return torch.where(inside, values[:, :1].expand_as(values) if constant else values, garbage)

    advantages = torch.randn(rows, generator=random, dtype=torch.float64)
    advantages[0] = 0
    return {
        "advantages": advantages,
        "scores": tokens(),
        "entropy": tokens().abs(),
        "weights": tokens().abs(),
        "confidence": -tokens().abs(),
        "correct": torch.rand(rows, generator=random) < 0.5,
        "lengths": lengths,
    }


RULES: dict[str, tuple[Callable[..., Tensor], Callable[..., Any], tuple[str, ...], dict[str, Any]]] = {
    "zscore": (zscore, reference.zscore, ("scores",), {}),
    "additive": (blend, reference.blend, ("advantages", "scores"), {"how": "additive", "weight": 0.3}),
    "multiplicative": (blend, reference.blend, ("advantages", "scores"), {"how": "multiplicative", "weight": 0.3}),
    "information": (
        information_advantages,
        reference.information_advantages,
        ("advantages", "scores", "confidence", "correct"),
        {"alpha": 0.1, "beta": 0.05},
    ),
    "information, unit norm": (
        information_advantages,
        reference.information_advantages,
        ("advantages", "scores", "confidence", "correct"),
        {"alpha": 0.1, "beta": 0.05, "norm": "l2"},
    ),
    "reallocation": (
        reallocate_by_entropy,
        reference.reallocate_by_entropy,
        ("advantages", "entropy"),
        {"mean": 0.7, "std": 0.4, "alpha": 0.5, "phi": 3.0},
    ),
    "quadrants": (entropy_quadrants, reference.entropy_quadrants, ("advantages", "entropy"), {"threshold": 0.6}),
    "weights": (weight_tokens, reference.weight_tokens, ("advantages", "weights"), {}),
    "gini": (gini, reference.gini, ("weights",), {}),
    "effective tokens": (effective_token_ratio, reference.effective_token_ratio, ("weights",), {}),
}


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    constant=st.booleans(),
    garbage=st.sampled_from([NAN, INF, -INF, 1e30]),
)
def test_rules_against_loops(rule: str, seed: int, rows: int, width: int, constant: bool, garbage: float) -> None:
    function, expected, names, options = RULES[rule]
    b = ragged(seed, rows, width, constant=constant, garbage=garbage)
    inputs = [b[name].requires_grad_() if b[name].is_floating_point() else b[name] for name in names]
    if "advantages" in names:
        b["advantages"].requires_grad_(False)
    actual = function(*inputs, b["lengths"], **options)
    assert not actual.requires_grad  # every rule is detached
    for i, length in enumerate(b["lengths"].tolist()):
        row = [b[name][i].item() if b[name].dim() == 1 else b[name][i, :length].tolist() for name in names]
        want = torch.tensor(expected(*row, **options), dtype=actual.dtype)
        torch.testing.assert_close(actual[i, :length] if actual.dim() == 2 else actual[i], want, rtol=1e-6, atol=1e-9)
    assert actual.isfinite().all()  # also behind the rows


# --- IAPO ---------------------------------------------------------------------------------------------------------


def test_information_by_hand() -> None:
    # s = 1, 3: z = -1, 1. pi = 0.2, 0.6: z = -1, 1 where right, 1, -1 where wrong
    s, probability = torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.tensor([[0.2, 0.6], [0.2, 0.6]])
    lengths = torch.tensor([2, 2])
    out = information_advantages(
        torch.tensor([1.0, -1.0]), s, probability, torch.tensor([True, False]), lengths, alpha=0.1, beta=0.01
    )
    torch.testing.assert_close(out, torch.tensor([[0.89, 1.11], [-1.09, -0.91]]))


def test_information_as_published_by_hand() -> None:
    # s = 1, 3, 5: mean 3, deviation 2, so s - 1.5 = -0.5, 1.5, 3.5 of length sqrt(14.75)
    # H = 4, 2, 0: mean 2, deviation 2, so H - 1 = 3, 1, -1 of length sqrt(11); c = -sign(R) H
    s, entropy = torch.tensor([[1.0, 3.0, 5.0]] * 2), torch.tensor([[4.0, 2.0, 0.0]] * 2)
    out = information_advantages(
        torch.tensor([1.0, -1.0]), s, -entropy, torch.tensor([True, False]), torch.tensor([3, 3]), norm="l2"
    )
    gain, confidence = torch.tensor([-0.5, 1.5, 3.5]) / 14.75**0.5, torch.tensor([3.0, 1.0, -1.0]) / 11**0.5
    expected = torch.stack([1 + 0.01 * gain - 0.01 * confidence, -1 + 0.01 * gain + 0.01 * confidence])
    torch.testing.assert_close(out, expected)


def test_tokens_that_a_stride_left_out_get_no_bonus() -> None:
    s = torch.tensor([[NAN, 1.0, NAN, 3.0], [NAN, NAN, NAN, NAN], [NAN, NAN, 7.0, NAN]])
    torch.testing.assert_close(
        zscore(s, torch.full((3,), 4)), torch.tensor([[0.0, -1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]).double()
    )
    out = information_advantages(
        torch.tensor([0.5, 0.5, 0.5]), s, torch.ones(3, 4), torch.ones(3), torch.full((3,), 4), alpha=0.1
    )
    torch.testing.assert_close(out, torch.tensor([[0.5, 0.4, 0.5, 0.6], [0.5] * 4, [0.5] * 4]))


# --- HAPO ---------------------------------------------------------------------------------------------------------


def test_reallocation_by_hand() -> None:
    # z of the entropies: -3, 0.1, 3; bounds |A| / 2 = 0.5 | 0.25
    entropy = torch.tensor([[0.0, 1.55, 3.0], [0.0, 1.55, 3.0], [0.0, 1.55, 3.0]]).double()
    out = reallocate_by_entropy(
        torch.tensor([1.0, -0.5, 0.0]).double(), entropy, torch.full((3,), 3), mean=1.5, std=0.5
    )
    expected = [[0.9, 1.02, 1.1], [-0.45, -0.52, -0.55], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(out, torch.tensor(expected).double())


@settings(max_examples=100, deadline=None)
@given(
    st.floats(-1e3, 1e3, width=32, allow_subnormal=False),  # of the least ones a share is 0
    st.lists(st.one_of(st.floats(0, 20, width=32), st.sampled_from([NAN, INF])), min_size=1, max_size=6),
    st.floats(0, 10),
    st.one_of(st.floats(0, 5), st.just(NAN)),
    st.floats(0.1, 5),
    st.floats(0, 0.999),
)
def test_reallocation_keeps_the_sign(
    advantage: float, entropy: list[float], mean: float, std: float, phi: float, share: float
) -> None:
    out = reallocate_by_entropy(
        torch.tensor([advantage]),
        torch.tensor([entropy]),
        torch.tensor([len(entropy)]),
        mean=mean,
        std=std,
        alpha=share * phi,
        phi=phi,
    )
    assert (out.sign() == torch.tensor(advantage).sign()).all()
    assert (out.abs() <= 2 * abs(advantage) * (1 + 1e-6)).all()


def test_entropies_without_variation_reallocate_nothing() -> None:
    advantages, entropy, lengths = torch.tensor([0.7]), torch.tensor([[0.3, 0.3, 9.0]]), torch.tensor([2])
    out = reallocate_by_entropy(advantages, entropy, lengths, mean=0.3, std=1e-9)
    assert torch.equal(out, torch.full((1, 3), 0.7))
    for alpha in (2.0, -0.1):
        with pytest.raises(ValueError, match="alpha"):
            reallocate_by_entropy(advantages, entropy, lengths, mean=0.3, std=1.0, alpha=alpha, phi=2.0)


def test_quadrants_by_hand() -> None:
    entropy = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.9], [0.9, 0.1, 0.9], [0.9, INF, NAN]])  # 0.5 is not above 0.5
    out = entropy_quadrants(torch.tensor([2.0, -2.0, 0.0, 1.0]), entropy, torch.tensor([3, 2, 3, 3]), threshold=0.5)
    assert out.tolist() == [[0, 1, 1], [2, 3, -1], [-1, -1, -1], [0, -1, -1]]
    assert [QUADRANTS[k] for k in out[:2, :2].flatten()] == [
        "positive_high",
        "positive_low",
        "negative_high",
        "negative_low",
    ]


# --- OTB ----------------------------------------------------------------------------------------------------------


def test_token_baseline_by_hand() -> None:
    # rewards 1, 0, 0 less 1/3; W of the first: 1, 2 | second: 3, 3, 4 | third: 0
    energy = torch.tensor([[1.0, 1.0, NAN], [3.0, 0.0, 1.0], [0.0, NAN, NAN]])
    advantages, lengths = torch.tensor([2 / 3, -1 / 3, -1 / 3]), torch.tensor([2, 3, 1])
    out = subtract_token_baseline(advantages, energy, lengths, 3)
    # baselines 1/4 and 2/5; the third token is the second's alone
    torch.testing.assert_close(out[0, :2], torch.tensor([0.75, 0.6]))
    torch.testing.assert_close(out[1], torch.tensor([-0.25, -0.4, 0.0]))
    assert out[2, 0] == pytest.approx(-0.25)
    tail = subtract_token_baseline(advantages, energy, lengths, 3, tail=torch.tensor([1.0, 7.0, 0.0]))
    assert tail[1, 2] == 7
    assert torch.equal(tail[:, :2], out[:, :2])
    # nothing gathered yet: the mean
    flat = subtract_token_baseline(advantages, torch.zeros(3, 1), torch.ones(3, dtype=torch.long), 3)
    torch.testing.assert_close(flat[:, 0], advantages)


@settings(max_examples=100, deadline=None)
@given(
    st.data(),
    st.integers(1, 4),
    st.integers(1, 3),
    st.floats(-3, 3, width=32),
    st.sampled_from([NAN, INF, -5.0]),
)
def test_token_baseline_against_loops(
    data: st.DataObject, size: int, groups: int, shift: float, garbage: float
) -> None:
    """Also where a group's rewards are shifted, as any baseline of the group does."""
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=size * groups, max_size=size * groups))
    rewards = data.draw(st.lists(st.integers(0, 4), min_size=size * groups, max_size=size * groups))
    energies = [data.draw(st.lists(st.sampled_from([0.0, 0.01, 0.5, 1.9]), min_size=n, max_size=n)) for n in lengths]
    width = max([*lengths, 1])
    energy = torch.tensor([row + [garbage] * (width - len(row)) for row in energies])
    given = torch.tensor(rewards).double() + shift
    out = subtract_token_baseline(given, energy, torch.tensor(lengths), size)
    assert out.isfinite().all()
    for first in range(0, size * groups, size):
        group = slice(first, first + size)
        expected = reference.token_baselines([float(r) for r in rewards[group]], energies[group])
        for row, want in enumerate(expected, first):
            assert out[row, : lengths[row]].tolist() == pytest.approx(want, abs=1e-6)


def test_what_is_not_measured_is_in_no_baseline() -> None:
    energy = torch.tensor([[1.0, 1.0], [NAN, NAN], [2.0, 2.0]])
    advantages, lengths = torch.tensor([0.5, 9.0, -0.5]), torch.tensor([2, 2, 2])
    out = subtract_token_baseline(advantages, energy, lengths, 3)
    torch.testing.assert_close(out[[0, 2]], torch.tensor([[2 / 3, 2 / 3], [-1 / 3, -1 / 3]]))


def test_equal_rewards_have_exactly_no_advantage() -> None:
    energy = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(torch.full((4,), 0.7), 4)
    assert (subtract_token_baseline(advantages, energy, torch.tensor([6, 5, 2, 3]), 4) == 0).all()


def test_the_token_baseline_has_the_least_variance() -> None:
    """One position, two answers: of all baselines, sum R W / sum W over their chances minimises E|(R - b) s|^2."""
    p = torch.tensor([0.2, 0.8]).double()
    rewards = torch.tensor([1.0, 0.0]).double()
    scores = torch.eye(2).double() - p  # (2, 2) of each answer, by the logits
    energy = scores.square().sum(1)  # |e - p|^2
    best = float((p * energy * rewards).sum() / (p * energy).sum())
    grid = torch.linspace(-1, 2, 3001).double()[:, None]  # (n, 1) baselines
    variance = (p * (rewards - grid).square() * energy).sum(1)
    assert grid[variance.argmin(), 0] == pytest.approx(best, abs=1e-3)
    mean = float((p * rewards).sum())
    assert best != pytest.approx(mean, abs=0.05)  # not the group's mean


# --- weights ------------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    weights = torch.tensor([[1.0, 3.0, NAN], [0.0, 0.0, 0.0], [0.0, 0.0, 5.0], [2.0, 2.0, 2.0]])
    lengths = torch.tensor([2, 3, 3, 3])
    out = weight_tokens(torch.tensor([2.0, 2.0, -1.0, 1.0]), weights, lengths)
    torch.testing.assert_close(out[0, :2], torch.tensor([1.0, 3.0]))
    assert out[1:].tolist() == [[2, 2, 2], [0, 0, -3], [1, 1, 1]]
    # of two: |1 - 3| * 2 / (2 * 2 * 4) = 1/4; of three, one with everything: 2/3
    torch.testing.assert_close(gini(weights, lengths), torch.tensor([1 / 4, 0, 2 / 3, 0]).double())
    torch.testing.assert_close(effective_token_ratio(weights, lengths), torch.tensor([16 / 20, 1, 1 / 3, 1]).double())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 9), st.floats(1e-3, 1e3))
def test_weights_keep_the_mean_and_have_no_unit(seed: int, rows: int, width: int, unit: float) -> None:
    b = ragged(seed, rows, width)
    args = (b["weights"], b["lengths"])
    out = weight_tokens(b["advantages"], *args)
    for i, length in enumerate(b["lengths"].tolist()):
        if length:
            torch.testing.assert_close(out[i, :length].mean(), b["advantages"][i])
    torch.testing.assert_close(weight_tokens(b["advantages"], unit * b["weights"], b["lengths"]), out)
    for statistic in (gini, effective_token_ratio):
        torch.testing.assert_close(statistic(unit * b["weights"], b["lengths"]), statistic(*args))
        assert ((statistic(*args) > -1e-12) & (statistic(*args) < 1 + 1e-12)).all()


def test_an_unmeasured_weight_is_not_hidden() -> None:
    assert weight_tokens(torch.ones(1), torch.tensor([[1.0, NAN]]), torch.tensor([2])).isnan().all()


@pytest.mark.parametrize("baseline", ["group", "batch", "leave_one_out"])
@pytest.mark.parametrize("normalize", ["none", "std", "mean"])
def test_no_rollouts_have_no_advantages(baseline, normalize):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert group_advantages(torch.zeros(0), 4, baseline=baseline, normalize=normalize).shape == (0,)
