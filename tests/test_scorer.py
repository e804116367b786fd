"""The scorer of a run against plain loops written from the definitions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aipo import scorer as module
from aipo.config.sections import MIConfig
from aipo.mi import FourierFeatures, coordinate_scores, fast_hsic, median_bandwidth
from aipo.scorer import PositionSums, TokenScorer, batch_scores


def make(**options: Any) -> TokenScorer:
    arguments = {key: options.pop(key) for key in ("seed", "max_positions", "all_reduce") if key in options}
    return TokenScorer(MIConfig(**options), **arguments)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- pointwise and position ---------------------------------------------------------------------------------------


LENGTHS = torch.tensor([5, 3, 6, 4])


def batch(d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    gold = normal(4, d, seed=1)
    hidden = gold.repeat_interleave(LENGTHS, 0) + normal(int(LENGTHS.sum()), d)
    return hidden, gold, LENGTHS


@pytest.mark.parametrize("center", [True, False])
def test_pointwise_scores_by_loops(center):
    hidden, gold, lengths = batch()
    paired = gold.repeat_interleave(lengths, 0)
    options: dict[str, Any] = {"num_features": 16, "sigma": 2.0, "seed": 3, "center": center}
    scores = batch_scores(hidden, gold, lengths, estimator="pointwise", **options)
    phi_of = FourierFeatures.draw("random", 4, 16, 3)
    x, y = phi_of(hidden.double(), 2.0), phi_of(paired.double(), 2.0)
    if center:
        x, y = x - x.mean(0), y - y.mean(0)
    n = len(x)
    covariance = torch.stack([torch.outer(x[i], y[i]) for i in range(n)]).sum(0) / (n - 1)
    expected = torch.stack([x[i] @ covariance @ y[i] for i in range(n)])
    torch.testing.assert_close(scores, expected.float(), rtol=1e-4, atol=1e-7)
    hsic = fast_hsic(hidden, paired, **options)
    assert scores.mean().item() == pytest.approx(hsic.item() * (n - 1) / n, rel=1e-4)


@pytest.mark.parametrize("center", [True, False])
def test_position_scores_by_loops(center):
    hidden, gold, lengths = batch()
    options: dict[str, Any] = {"num_features": 16, "sigma": 2.0, "seed": 3, "center": center}
    scores = batch_scores(hidden, gold, lengths, estimator="position", **options)
    scores = scores.split(lengths.tolist())
    states = hidden.split(lengths.tolist())
    for t in range(6):
        running = [i for i in range(4) if lengths[i] > t]
        expected = fast_hsic(torch.stack([states[i][t] for i in running]), gold[running], **options)
        for i in running:
            assert scores[i][t].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)
    assert scores[2][5] == 0  # a single rollout is left there


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    which=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    elements=st.sampled_from([1, 130, 10_000]),
)
def test_positions_by_blocks_are_those_of_the_definition(lengths: list[int], which: list[int], elements: int):
    """Rollouts that share gold states, and blocks of one position, of a few, of all."""
    answers = normal(3, 4, seed=5)
    gold, count = answers[which[: len(lengths)]], torch.tensor(lengths)
    hidden = normal(sum(lengths), 4, seed=sum(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ELEMENTS", elements)
        scorer = make(estimator="position", num_features=8, sigma=2.0, max_positions=10)
        scorer.observe(hidden, gold, count)
        scorer.reduce()
        scores = scorer.score(hidden, gold, count)
    states, found = hidden.split(lengths), scores.split(lengths)
    for t in range(max(lengths)):
        running = [i for i, length in enumerate(lengths) if length > t]
        each = torch.stack([states[i][t] for i in running])
        expected = fast_hsic(each, gold[running], num_features=8, sigma=2.0, seed=0) if len(running) > 1 else 0.0
        for i in running:
            assert float(found[i][t]) == pytest.approx(float(expected), rel=1e-4, abs=1e-9)


def test_memory_of_positions_is_that_of_the_gold_states():
    """Two questions of four rollouts, 500 positions, 64 features: not 500 times 64 x 64."""
    gold, lengths = normal(2, 4).repeat_interleave(4, 0), torch.full((8,), 500)
    scorer = make(estimator="position", num_features=64, sigma=2.0, max_positions=500)
    scorer.observe(normal(4000, 4), gold, lengths)
    assert isinstance(scorer.batch, PositionSums)
    assert sum(x.numel() for _, _, x in scorer.batch.parts.values()) == 2 * 500 * 64


def scorer_of(estimator: Any, **options) -> TokenScorer:
    return make(estimator=estimator, **{"num_features": 8, "sigma": 2.0, "max_positions": 8, **options})


@pytest.mark.parametrize("estimator", ["pointwise", "position"])
@pytest.mark.parametrize("normalize", ["none", "layernorm", "zscore"])
def test_micro_batches_and_ranks_equal_one_batch(estimator, normalize):
    hidden, gold, lengths = batch()
    cut = int(lengths[:2].sum())
    parts = [(hidden[:cut], gold[:2], lengths[:2]), (hidden[cut:], gold[2:], lengths[2:])]
    empty = (hidden[:0], gold[:1], torch.tensor([0]))

    whole = scorer_of(estimator, normalize=normalize)
    whole.observe(hidden, gold, lengths)
    whole.reduce()
    expected = whole.score(hidden, gold, lengths)

    split = scorer_of(estimator, normalize=normalize)
    for part in (parts[0], empty, parts[1]):
        split.observe(*part)
    split.reduce()
    torch.testing.assert_close(torch.cat([split.score(*part) for part in parts]), expected)

    # Two ranks: what one all-reduces is added to what the other one holds.
    other = scorer_of(estimator, normalize=normalize)
    other.observe(*parts[1])
    assert other.batch is not None
    by_position = isinstance(other.batch, PositionSums)
    held = iter([other.batch.count(8), *other.batch.moments(0, 5)] if by_position else list(other.batch))
    rank = scorer_of(estimator, normalize=normalize, all_reduce=lambda tensor: tensor.add_(next(held)))
    rank.observe(*parts[0])
    rank.reduce()
    torch.testing.assert_close(rank.score(*parts[0]), expected[:cut])


@pytest.mark.parametrize("estimator", ["pointwise", "position"])
def test_tokens_that_are_not_finite_count_for_nothing(estimator):
    hidden, gold, lengths = batch()
    hidden[int(lengths[:3].sum())] = float("nan")  # first token of the last rollout
    scorer = scorer_of(estimator)
    scorer.observe(hidden, gold, lengths)
    scorer.reduce()
    scores = scorer.score(hidden, gold, lengths)
    assert scores.isfinite().all()
    assert scores[int(lengths[:3].sum())] == 0
    gold[0] = float("inf")
    scorer.observe(hidden, gold, lengths)
    scorer.reduce()
    assert (scorer.score(hidden, gold, lengths)[: lengths[0]] == 0).all()


def test_pointwise_average_over_steps():
    hidden, gold, lengths = batch()
    steps = [hidden + k * normal(len(hidden), 4, seed=10 + k) for k in range(4)]
    phi_of = FourierFeatures.draw("random", 4, 8, 0)
    y = phi_of(gold.repeat_interleave(lengths, 0).double(), 2.0)
    x = [phi_of(step.double(), 2.0) for step in steps]
    n = len(y)

    def expected(weights: list[float], k: int) -> Tensor:
        mean_x = torch.stack([w * x[i].mean(0) for i, w in enumerate(weights)]).sum(0)
        moment = torch.stack([w * x[i].T @ y / n for i, w in enumerate(weights)]).sum(0)
        covariance = (moment - torch.outer(mean_x, y.mean(0))) * n / (n - 1)
        return (((x[k] - mean_x) @ covariance) * (y - y.mean(0))).sum(-1).float()

    scorer = scorer_of("pointwise", ema_decay=0.9, warmup_steps=2)
    after_two_steps = None
    for k, step in enumerate(steps):
        if k == 2:
            after_two_steps = scorer.state_dict()
        scorer.observe(step, gold, lengths)
        scorer.reduce()
        weights = [[1.0], [0.5, 0.5], [0.45, 0.45, 0.1], [0.405, 0.405, 0.09, 0.1]][k]
        torch.testing.assert_close(scorer.score(step, gold, lengths), expected(weights, k), rtol=1e-4, atol=1e-6)

    resumed = scorer_of("pointwise", ema_decay=0.9, warmup_steps=2, seed=99)  # the draws come from the state
    assert after_two_steps is not None
    resumed.load_state_dict(after_two_steps)
    for step in steps[2:]:
        resumed.observe(step, gold, lengths)
        resumed.reduce()
    assert torch.equal(resumed.score(steps[3], gold, lengths), scorer.score(steps[3], gold, lengths))


def test_a_step_without_tokens_keeps_the_running_covariance():
    hidden, gold, lengths = batch()
    scorer = scorer_of("pointwise")
    scorer.observe(hidden, gold, lengths)
    scorer.reduce()
    before = scorer.score(hidden, gold, lengths)
    scorer.observe(hidden[:0], gold, 0 * lengths)
    scorer.reduce()
    assert torch.equal(scorer.score(hidden, gold, lengths), before)


def test_median_bandwidth_is_agreed_on_by_ranks():
    hidden, gold, lengths = batch()
    alone = median_bandwidth(hidden).double()

    def with_empty_rank(tensor: Tensor) -> Tensor:
        return tensor

    def with_rank_of_bandwidth_three(tensor: Tensor) -> Tensor:
        return tensor.add_(torch.tensor([3.0, 1.0])) if tensor.shape == (2,) else tensor

    for all_reduce, expected in ((with_empty_rank, alone), (with_rank_of_bandwidth_three, (alone + 3) / 2)):
        scorer = scorer_of("pointwise", sigma="median", all_reduce=all_reduce)
        scorer.observe(hidden, gold, lengths)
        assert scorer.bandwidth is not None
        assert scorer.bandwidth.item() == pytest.approx(expected.item())


# --- the object ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("sigma", [2.0, "median"])
@pytest.mark.parametrize("normalize", ["none", "layernorm", "zscore"])
def test_coordinate_scorer_takes_each_rollout_with_its_own_gold(normalize, sigma, center):
    """And with its own medians, of its states and of its gold state."""
    hidden, gold, lengths = batch(d=64)
    scale = torch.tensor([[1.0], [0.3], [2.0], [4.0]])
    hidden, gold = hidden * scale.repeat_interleave(lengths, 0), gold * scale.flip(0)
    scorer = make(normalize=normalize, num_features=16, sigma=sigma, center=center, seed=4)
    assert scorer.local
    scores = scorer.score(hidden, gold, lengths).split(lengths.tolist())
    for rollout, (states, answer) in enumerate(zip(hidden.split(lengths.tolist()), gold)):
        if normalize == "layernorm":
            states = (states - states.mean(1, keepdim=True)) / states.var(1, correction=0, keepdim=True).sqrt()
            answer = (answer - answer.mean()) / answer.var(correction=0).sqrt()
        elif normalize == "zscore":
            mean, std = states.mean(0), states.var(0, correction=0).sqrt()
            states, answer = (states - mean) / std, (answer - mean) / std
        if sigma == "median":
            states = 2.0 * states / median_bandwidth(states.reshape(-1, 1))
            answer = 2.0 * answer / median_bandwidth(answer[:, None])
        expected = coordinate_scores(states, answer, num_features=16, sigma=2.0, center=center, seed=4)
        torch.testing.assert_close(scores[rollout], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("normalize", "seen"), [("none", [3]), ("layernorm", [3]), ("zscore", [4])])
def test_the_work_on_gold_states_is_done_once_for_all(monkeypatch, normalize, seen):
    """Of a step's questions if it is told them, else of a micro-batch's; zscore makes a gold state of each rollout."""
    hidden, gold, lengths = batch(d=64)
    question = torch.tensor([2, 0, 2, 1])  # of each rollout
    states = []
    monkeypatch.setattr(module, "gold_factors", lambda gold, *rest: states.append(len(gold)) or factors(gold, *rest))
    scorer = make(normalize=normalize, num_features=16, sigma=2.0)
    scorer.prepare(gold[:3])
    scores = scorer.score(hidden, gold[question], lengths)
    repeated = scorer.score(hidden, gold[question], lengths)
    start = int(lengths[:3].sum())
    torch.testing.assert_close(scorer.score(hidden[start:], gold[question[3:]], lengths[3:]), scores[start:])
    assert torch.equal(repeated, scores)
    assert states == seen
    scorer.load_state_dict(make(num_features=16, seed=1).state_dict())  # other draws: nothing is kept
    other = make(normalize=normalize, num_features=16, sigma=2.0, seed=1)
    assert torch.equal(scorer.score(hidden, gold[question], lengths), other.score(hidden, gold[question], lengths))


factors = module.gold_factors


def test_scorer_of_other_draws_loads_the_saved_ones():
    hidden, gold, lengths = batch(d=64)
    first, second = make(num_features=16, seed=0), make(num_features=16, seed=1)
    assert not torch.equal(first.score(hidden, gold, lengths), second.score(hidden, gold, lengths))
    state = first.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    json.dumps({key: value.tolist() for key, value in state.items()})
    second.load_state_dict(state)
    assert torch.equal(first.score(hidden, gold, lengths), second.score(hidden, gold, lengths))
    with pytest.raises(ValueError, match="16 features, this one 8"):
        make(num_features=8).load_state_dict(state)


def test_wrong_use_is_refused():
    hidden, gold, lengths = batch()
    with pytest.raises(ValueError, match="estimator"):
        make(estimator="pair")
    with pytest.raises(ValueError, match="normalize"):
        make(normalize="batch")
    with pytest.raises(ValueError, match="scalars only"):
        make(estimator="pointwise", features="quadrature")
    with pytest.raises(ValueError, match="needs max_positions"):
        make(estimator="position")
    with pytest.raises(ValueError, match="longer than max_positions"):
        scorer_of("position", max_positions=3).observe(hidden, gold, lengths)
    with pytest.raises(RuntimeError, match="after observe"):
        scorer_of("pointwise").score(hidden, gold, lengths)
    with pytest.raises(RuntimeError, match="needs an observe"):
        scorer_of("pointwise").reduce()
    with pytest.raises(RuntimeError, match="nothing to observe"):
        make().observe(hidden, gold, lengths)
    with pytest.raises(ValueError, match="do not fit lengths"):
        make().score(hidden[1:], gold, lengths)


@pytest.mark.parametrize("estimator", ["pointwise", "position"])
def test_a_step_without_any_token_changes_nothing(estimator: Any) -> None:
    """Every group was dropped, on every rank: nothing to learn from, and nothing that spoils the next step."""
    scorer = make(estimator=estimator, num_features=8, sigma=1.0, max_positions=4)
    nothing, no_gold, no_lengths = torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    scorer.observe(nothing, no_gold, no_lengths)
    scorer.reduce()
    assert scorer.running is None
    assert scorer.steps == 0
    assert scorer.score(nothing, no_gold, no_lengths).shape == (0,)
