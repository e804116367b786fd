"""FastHSIC against exact HSIC and against plain loops written from the definitions."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.stats import spearmanr
from torch import Tensor

from aipo.mi import (
    FourierFeatures,
    coordinate_scores,
    exact_hsic,
    fast_hsic,
    median_bandwidth,
)
from aipo.scorer import TokenScorer, pointwise_scores, position_scores

KINDS = ["random", "orthogonal", "quadrature"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def planted(tokens: int = 40, d: int = 256, scale: float = 20.0) -> tuple[Tensor, Tensor]:
    """States that carry the gold state with strengths from 0 to 1."""
    gold, strength = normal(d, seed=1), torch.linspace(0, 1, tokens)[:, None]
    return scale * (strength * gold + (1 - strength**2).sqrt() * normal(tokens, d, seed=2)), scale * gold


def hsic_by_loops(x: list[float], y: list[float], sigma: float) -> float:
    n = len(x)
    k = np.array([[math.exp(-((a - b) ** 2) / (2 * sigma**2)) for a in x] for b in x])
    l = np.array([[math.exp(-((a - b) ** 2) / (2 * sigma**2)) for a in y] for b in y])  # noqa: E741
    h = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(k @ h @ l @ h)) / (n - 1) ** 2


# --- HSIC ---------------------------------------------------------------------------------------------------------


def test_exact_hsic_matches_the_definition_and_a_hand_worked_pair():
    x, y = normal(30, 1, dtype=torch.float64), normal(30, 1, seed=1, dtype=torch.float64)
    expected = hsic_by_loops(x[:, 0].tolist(), y[:, 0].tolist(), 0.7)
    assert exact_hsic(x, y, sigma=0.7).item() == pytest.approx(expected, rel=1e-10)
    # Two samples a distance sqrt(2) sigma apart: K = L = [[1, 1/e], [1/e, 1]], tr(KHLH) = (1 - 1/e)^2, n - 1 = 1.
    pair = torch.tensor([[0.0], [2**0.5]])
    assert exact_hsic(pair, pair, sigma=1.0).item() == pytest.approx((1 - math.exp(-1)) ** 2, rel=1e-6)


def test_fast_hsic_is_the_printed_formula():
    x, y = normal(20, 3), normal(20, 3, seed=1)
    phi = FourierFeatures.draw("random", 3, 16, seed=5)

    def map_of(v: Tensor) -> np.ndarray:
        return math.sqrt(2 / 16) * np.cos(v.double().numpy() @ phi.frequency.numpy() / 2.0 + phi.phase.numpy())

    h = np.eye(20) - np.ones((20, 20)) / 20
    expected = np.linalg.norm(map_of(x).T @ h @ map_of(y)) ** 2 / 19**2
    assert fast_hsic(x, y, num_features=16, sigma=2.0, seed=5).item() == pytest.approx(expected, rel=1e-5)
    uncentred = np.linalg.norm(map_of(x).T @ map_of(y)) ** 2 / 19**2
    assert fast_hsic(x, y, num_features=16, sigma=2.0, seed=5, center=False).item() == pytest.approx(
        uncentred, rel=1e-5
    )


@pytest.mark.parametrize("kind", ["random", "orthogonal"])
def test_error_falls_as_one_over_root_d(kind):
    x = normal(30, 4, dtype=torch.float64)
    y = x + 0.5 * normal(30, 4, seed=1, dtype=torch.float64)
    exact = exact_hsic(x, y, sigma=2.0)

    def rms(num_features: int) -> float:
        runs = [fast_hsic(x, y, num_features=num_features, sigma=2.0, seed=s, features=kind) for s in range(50)]
        return (torch.stack(runs) - exact).square().mean().sqrt().item()

    slope = math.log(rms(512) / rms(32)) / math.log(16)
    assert -0.75 < slope < -0.3


def test_orthogonal_features_beat_random_ones_on_the_kernel():
    x = normal(50, 16, dtype=torch.float64)
    kernel = torch.exp(-torch.cdist(x, x).square() / (2 * 16))

    def error(kind: Any) -> float:
        phis = [FourierFeatures.draw(kind, 16, 64, seed)(x, 4.0) for seed in range(30)]
        return float(torch.stack([(phi @ phi.T - kernel).square().mean() for phi in phis]).mean())

    assert error("orthogonal") < 0.9 * error("random")


def test_quadrature_converges_much_faster():
    x, y = 20 * normal(512, 1, dtype=torch.float64), 20 * normal(512, 1, seed=1, dtype=torch.float64)
    y = y + 0.5 * x
    exact = exact_hsic(x, y, sigma=50.0).item()

    def error(kind: Any, num_features: int) -> float:
        return abs(fast_hsic(x, y, num_features=num_features, sigma=50.0, features=kind).item() / exact - 1)

    errors = [error("quadrature", count) for count in (4, 8, 16)]
    assert errors[0] > 30 * errors[1] > 30 * 30 * errors[2]
    assert errors[2] < 1e-6
    assert errors[2] < 1e-3 * error("random", 4096)


@pytest.mark.parametrize("nodes", [1, 2, 7, 16])
def test_quadrature_features_are_the_gauss_hermite_rule(nodes):
    phi = FourierFeatures.draw("quadrature", 1, nodes, seed=0)
    node, weight = hermegauss(nodes)
    delta = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    expected = [sum(weight * np.cos(node * t)) / math.sqrt(2 * math.pi) for t in delta[:, 0].tolist()]
    at_zero = phi(torch.zeros(1, 1, dtype=torch.float64), 1.0)
    assert phi.phase.shape == (nodes,)
    np.testing.assert_allclose((phi(delta, 1.0) @ at_zero.T)[:, 0], expected, atol=1e-12)


def test_independent_is_near_zero_and_dependent_is_not():
    x, noise = normal(400, 1), normal(400, 1, seed=1)
    options: dict[str, Any] = {"num_features": 256, "sigma": 1.0}
    independent = fast_hsic(x, noise, **options)
    assert independent < 0.003
    assert fast_hsic(x, x, **options) > 20 * independent
    assert fast_hsic(x, x.square(), **options) > 10 * independent  # uncorrelated, yet dependent


def test_batches_draws_and_choices():
    x, y = normal(2, 3, 10, 4), normal(2, 3, 10, 2, seed=1)
    options: dict[str, Any] = {"num_features": 8, "sigma": "median", "seed": 3}
    batched = fast_hsic(x, y, **options)
    assert batched.shape == (2, 3)
    torch.testing.assert_close(batched[1, 2], fast_hsic(x[1, 2], y[1, 2], **options))
    assert not torch.equal(batched, fast_hsic(x, y, **{**options, "seed": 4}))
    with pytest.raises(ValueError, match="scalars only"):
        fast_hsic(x, y, num_features=8, sigma=1.0, features="quadrature")
    with pytest.raises(ValueError, match="random, orthogonal or quadrature"):
        fast_hsic(x, y, num_features=8, sigma=1.0, features="fourier")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pair up"):
        fast_hsic(x, y[:, :, :9], num_features=8, sigma=1.0)
    with pytest.raises(ValueError, match="sigma must be positive"):
        fast_hsic(x, y, num_features=8, sigma=0.0)


def test_median_bandwidth():
    # Distances 1, 2, 3 (and one zero, left out): the median is 2.
    points = torch.tensor([[0.0], [0.0], [1.0], [3.0]])
    pairs = [1.0, 1.0, 3.0, 3.0, 2.0]
    assert median_bandwidth(points).item() == pytest.approx(sorted(pairs)[2] / math.sqrt(2))
    assert median_bandwidth(torch.ones(5, 2)) == 1.0
    many = normal(20_000, 1)
    assert median_bandwidth(many) == median_bandwidth(many)
    # |x - x'| of N(0, 1) pairs is sqrt(2)|N|, whose median is sqrt(2) 0.6745.
    assert median_bandwidth(many).item() == pytest.approx(0.6745, rel=0.1)


@pytest.mark.parametrize(
    "function", [lambda x, y: fast_hsic(x, y, num_features=16, sigma=1.0), lambda x, y: exact_hsic(x, y, sigma=1.0)]
)
def test_what_cannot_be_measured_is_zero(function):
    x = normal(6, 2)
    assert function(x[:1], x[:1]) == 0
    assert function(x[:0], x[:0]) == 0
    assert function(torch.ones_like(x), x).item() == pytest.approx(0, abs=1e-12)
    assert function(x, torch.full_like(x, 3.3)).item() == pytest.approx(0, abs=1e-12)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert function(torch.where(x == x[2, 1], bad, x), x) == 0


# --- coordinate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("scale", "sigma"), [(20.0, 50.0), (1.0, 1.0), (1.0, 50.0), (20.0, 2.0)])
def test_coordinate_scores_equal_the_plain_formula(kind, center, scale, sigma):
    hidden, gold = planted(scale=scale)
    options: dict[str, Any] = {"num_features": 24, "sigma": sigma, "center": center, "features": kind, "seed": 7}
    plain = fast_hsic(hidden.double()[:, :, None], gold.double()[None, :, None].expand(len(hidden), -1, -1), **options)
    streamed = coordinate_scores(hidden, gold, **options, chunk=7)
    assert streamed.dtype == torch.float32
    torch.testing.assert_close(streamed.double(), plain, rtol=1e-5, atol=1e-5 * plain.mean().item())
    torch.testing.assert_close(streamed, coordinate_scores(hidden, gold, **options), rtol=1e-5, atol=0)


def test_rank_correlation_with_exact_scores():
    hidden, gold = planted(tokens=60)
    hidden = hidden * torch.linspace(0.5, 1.5, 60)[torch.randperm(60, generator=torch.Generator().manual_seed(1)), None]
    exact = exact_hsic(hidden[:, :, None], gold[None, :, None].expand(60, -1, -1), sigma=50.0)
    for seed in range(5):
        scores = coordinate_scores(hidden, gold, num_features=256, sigma=50.0, seed=seed)
        assert spearmanr(scores, exact).statistic >= 0.97
    scores = coordinate_scores(hidden, gold, num_features=16, sigma=50.0, features="quadrature")
    torch.testing.assert_close(scores, exact, rtol=1e-4, atol=1e-5 * exact.max().item())


def test_coordinate_scores_bf16_and_autocast():
    hidden, gold = planted()
    options: dict[str, Any] = {"num_features": 64, "sigma": 50.0}
    low = coordinate_scores(hidden.bfloat16(), gold.bfloat16(), **options)
    rounded = coordinate_scores(hidden.bfloat16().float(), gold.bfloat16().float(), **options)
    assert low.dtype == torch.float32
    assert torch.equal(low, rounded)  # the input is rounded, the arithmetic is not
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(coordinate_scores(hidden.bfloat16(), gold.bfloat16(), **options), low)


def test_coordinate_scores_of_bad_tokens_are_zero():
    hidden, gold = planted()
    options: dict[str, Any] = {"num_features": 32, "sigma": 50.0}
    clean = coordinate_scores(hidden, gold, **options)
    hidden[3, 5], hidden[4, 0], hidden[5] = float("nan"), float("inf"), 2.5
    scores = coordinate_scores(hidden, gold, **options)
    assert (scores[3:6] == 0).all()
    rest = [t for t in range(len(hidden)) if t not in (3, 4, 5)]
    torch.testing.assert_close(scores[rest], clean[rest])
    for bad_gold in (torch.full_like(gold, 1.7), torch.where(gold == gold[0], float("nan"), gold)):
        assert (coordinate_scores(hidden, bad_gold, **options) == 0).all()
    assert coordinate_scores(hidden[:, :1], gold[:1], **options).tolist() == [0.0] * len(hidden)
    assert coordinate_scores(hidden[:0], gold, **options).shape == (0,)


def test_median_makes_coordinate_scores_scale_free():
    hidden, gold = planted()
    options: dict[str, Any] = {"num_features": 32, "sigma": "median"}
    torch.testing.assert_close(
        coordinate_scores(hidden * 37, gold * 37, **options),
        coordinate_scores(hidden, gold, **options),
        rtol=1e-3,
        atol=1e-8,
    )


# --- pointwise and position ---------------------------------------------------------------------------------------


LENGTHS = torch.tensor([5, 3, 6, 4])


def batch(d: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    gold = normal(4, d, seed=1)
    hidden = gold.repeat_interleave(LENGTHS, 0) + normal(int(LENGTHS.sum()), d)
    return hidden, gold, LENGTHS


def test_pointwise_scores_by_loops():
    hidden, gold, lengths = batch()
    paired = gold.repeat_interleave(lengths, 0)
    scores = pointwise_scores(hidden, gold, lengths, num_features=16, sigma=2.0, seed=3)
    phi_of = FourierFeatures.draw("random", 4, 16, 3)
    x, y = phi_of(hidden.double(), 2.0), phi_of(paired.double(), 2.0)
    x, y = x - x.mean(0), y - y.mean(0)
    n = len(x)
    covariance = torch.stack([torch.outer(x[i], y[i]) for i in range(n)]).sum(0) / (n - 1)
    expected = torch.stack([x[i] @ covariance @ y[i] for i in range(n)])
    torch.testing.assert_close(scores, expected.float(), rtol=1e-4, atol=1e-7)
    hsic = fast_hsic(hidden, paired, num_features=16, sigma=2.0, seed=3)
    assert scores.mean().item() == pytest.approx(hsic.item() * (n - 1) / n, rel=1e-4)


def test_position_scores_by_loops():
    hidden, gold, lengths = batch()
    scores = position_scores(hidden, gold, lengths, num_features=16, sigma=2.0, seed=3).split(lengths.tolist())
    states = hidden.split(lengths.tolist())
    for t in range(6):
        running = [i for i in range(4) if lengths[i] > t]
        expected = fast_hsic(
            torch.stack([states[i][t] for i in running]), gold[running], num_features=16, sigma=2.0, seed=3
        )
        for i in running:
            assert scores[i][t].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)
    assert scores[2][5] == 0  # a single rollout is left there


def scorer_of(estimator: Any, **options) -> TokenScorer:
    return TokenScorer(estimator=estimator, **{"num_features": 8, "sigma": 2.0, "max_positions": 8, **options})


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
    held = iter(list(other.batch))
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


@pytest.mark.parametrize("normalize", ["none", "layernorm", "zscore"])
def test_coordinate_scorer_takes_each_rollout_with_its_own_gold(normalize):
    hidden, gold, lengths = batch(d=64)
    scorer = TokenScorer(normalize=normalize, num_features=16, sigma=2.0, seed=4)
    assert scorer.local
    scores = scorer.score(hidden, gold, lengths).split(lengths.tolist())
    for rollout, (states, answer) in enumerate(zip(hidden.split(lengths.tolist()), gold)):
        if normalize == "layernorm":
            states = (states - states.mean(1, keepdim=True)) / states.var(1, correction=0, keepdim=True).sqrt()
            answer = (answer - answer.mean()) / answer.var(correction=0).sqrt()
        elif normalize == "zscore":
            mean, std = states.mean(0), states.var(0, correction=0).sqrt()
            states, answer = (states - mean) / std, (answer - mean) / std
        expected = coordinate_scores(states, answer, num_features=16, sigma=2.0, seed=4)
        torch.testing.assert_close(scores[rollout], expected, rtol=1e-3, atol=1e-7)


def test_scorer_of_other_draws_loads_the_saved_ones():
    hidden, gold, lengths = batch(d=64)
    first, second = TokenScorer(num_features=16, seed=0), TokenScorer(num_features=16, seed=1)
    assert not torch.equal(first.score(hidden, gold, lengths), second.score(hidden, gold, lengths))
    state = first.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    json.dumps({key: value.tolist() for key, value in state.items()})
    second.load_state_dict(state)
    assert torch.equal(first.score(hidden, gold, lengths), second.score(hidden, gold, lengths))
    with pytest.raises(ValueError, match="16 features, this one 8"):
        TokenScorer(num_features=8).load_state_dict(state)


def test_wrong_use_is_refused():
    hidden, gold, lengths = batch()
    with pytest.raises(ValueError, match="estimator must be one of"):
        TokenScorer(estimator="pair")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normalize must be one of"):
        TokenScorer(normalize="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scalars only"):
        TokenScorer(estimator="pointwise", features="quadrature")
    with pytest.raises(ValueError, match="needs max_positions"):
        TokenScorer(estimator="position")
    with pytest.raises(ValueError, match="at most 114 features"):
        TokenScorer(estimator="position", max_positions=10_240, num_features=256)
    with pytest.raises(ValueError, match="longer than max_positions"):
        scorer_of("position", max_positions=3).observe(hidden, gold, lengths)
    with pytest.raises(RuntimeError, match="after observe"):
        scorer_of("pointwise").score(hidden, gold, lengths)
    with pytest.raises(RuntimeError, match="needs an observe"):
        scorer_of("pointwise").reduce()
    with pytest.raises(RuntimeError, match="nothing to observe"):
        TokenScorer().observe(hidden, gold, lengths)
    with pytest.raises(ValueError, match="do not fit lengths"):
        TokenScorer().score(hidden[1:], gold, lengths)


@pytest.mark.parametrize("estimator", ["pointwise", "position"])
def test_a_step_without_any_token_changes_nothing(estimator: Any) -> None:
    """Every group was dropped, on every rank: nothing to learn from, and nothing that spoils the next step."""
    scorer = TokenScorer(estimator=estimator, num_features=8, sigma=1.0, max_positions=4)
    nothing, no_gold, no_lengths = torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    scorer.observe(nothing, no_gold, no_lengths)
    scorer.reduce()
    assert scorer.running is None
    assert scorer.steps == 0
    assert scorer.score(nothing, no_gold, no_lengths).shape == (0,)
