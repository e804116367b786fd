"""Advantages by hand and against loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aipo.advantage import blend, constant_groups, group_advantages

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


@pytest.mark.parametrize("baseline", ["group", "batch", "leave_one_out"])
@pytest.mark.parametrize("normalize", ["none", "std"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7])
def test_equal_rewards_give_exactly_zero(baseline: str, normalize: str, reward: float) -> None:
    advantages = group_advantages(torch.full((14,), reward), 7, baseline=baseline, normalize=normalize)
    assert advantages.tolist() == [0.0] * 14


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("normalize", ["none", "std"])
def test_a_lone_sample_has_no_advantage(baseline: str, normalize: str) -> None:
    assert group_advantages(torch.tensor([1.0, 0.0]), 1, baseline=baseline, normalize=normalize).tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["group", "batch", "leave_one_out"]), st.sampled_from(["none", "std"]))
def test_against_loops(data: st.DataObject, baseline: str, normalize: str) -> None:
    size = data.draw(st.integers(2, 5))
    count = size * data.draw(st.integers(1, 4))
    rewards = data.draw(st.lists(st.integers(0, 10).map(lambda r: r / 10), min_size=count, max_size=count))
    expected = []
    for i, reward in enumerate(rewards):
        first = i // size * size
        group = rewards if baseline == "batch" else rewards[first : first + size]
        others = [r for j, r in enumerate(group) if j != (i - first)]
        mean = statistics.mean(others if baseline == "leave_one_out" else group)
        expected.append((reward - mean) / (statistics.stdev(group) + 1e-6 if normalize == "std" else 1))
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


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=12).filter(lambda s: len(set(s)) > 1), st.integers(0, 4))
def test_blend_against_statistics(scores: list[int], padding: int) -> None:
    row = torch.tensor([[*map(float, scores), *[1e9] * padding]])
    out = blend(torch.tensor([2.0]), row, torch.tensor([len(scores)]), how="additive", weight=1.0)[0]
    mean, std = statistics.mean(scores), statistics.pstdev(scores)
    torch.testing.assert_close(out[: len(scores)], torch.tensor([2 + (s - mean) / std for s in scores]))
