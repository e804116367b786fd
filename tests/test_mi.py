"""FastHSIC against exact HSIC and against plain loops written from the definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.polynomial.hermite_e import hermegauss
from scipy.stats import spearmanr
from torch import Tensor

from aipo import mi
from aipo.mi import (
    REACH,
    FourierFeatures,
    alternating,
    chebyshev,
    coordinate_scores,
    exact_hsic,
    factor_scores,
    fast_hsic,
    gold_factors,
    median_bandwidth,
    token_bandwidths,
)

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


def median_by_loops(x: Tensor) -> float:
    """Of the non-zero distances of all pairs of rows, the middle one (of two the lower), over sqrt(2)."""
    rows = x.tolist()
    distances = sorted(math.dist(a, b) for i, a in enumerate(rows) for b in rows[:i] if a != b)
    return distances[(len(distances) - 1) // 2] / math.sqrt(2)


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


@pytest.mark.parametrize("center", [True, False])
def test_the_median_is_of_each_variable_and_of_each_set_by_itself(center):
    """Of whole vectors: their first coordinate varies least."""
    x, y = normal(2, 10, 3) * torch.tensor([0.1, 1.0, 3.0]), 7 * normal(2, 10, 2, seed=1)
    x[1] *= 4
    options: dict[str, Any] = {"num_features": 32, "center": center}
    found, exact = fast_hsic(x, y, sigma="median", **options), exact_hsic(x, y, sigma="median")
    for i in range(2):
        unit = x[i] / median_by_loops(x[i]), y[i] / median_by_loops(y[i])
        torch.testing.assert_close(found[i], fast_hsic(*unit, sigma=1.0, **options), rtol=1e-4, atol=0)
        torch.testing.assert_close(exact[i], exact_hsic(*unit, sigma=1.0), rtol=1e-4, atol=0)


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


@pytest.mark.parametrize("center", [True, False])
def test_the_median_of_coordinates_is_of_all_states_and_of_the_gold_state(center):
    """Each with its own, the tokens with one for all of them: 66 and 22 scalars."""
    hidden, gold = planted(tokens=3, d=22)
    hidden, gold = hidden * torch.tensor([[0.2], [1.0], [3.0]]), 5 * gold
    unit = hidden / median_by_loops(hidden.reshape(-1, 1)), gold / median_by_loops(gold[:, None])
    options: dict[str, Any] = {"num_features": 32, "center": center, "seed": 2}
    scores = coordinate_scores(hidden, gold, sigma="median", **options)
    torch.testing.assert_close(scores, plain_scores(*unit, sigma=1.0, **options).float(), rtol=1e-4, atol=1e-7)


def test_median_makes_coordinate_scores_scale_free():
    hidden, gold = planted()
    options: dict[str, Any] = {"num_features": 32, "sigma": "median"}
    torch.testing.assert_close(
        coordinate_scores(hidden * 37, gold * 37, **options),
        coordinate_scores(hidden, gold, **options),
        rtol=1e-3,
        atol=1e-8,
    )


# --- the series behind them ---------------------------------------------------------------------------------------


def plain_scores(hidden: Tensor, gold: Tensor, **options: Any) -> Tensor:
    """Eq. 1 as printed, in fp64."""
    return fast_hsic(hidden.double()[:, :, None], gold.double()[None, :, None].expand(len(hidden), -1, -1), **options)


def test_chebyshev_polynomials():
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    expected = torch.cos(torch.arange(30)[:, None] * torch.acos(x))
    torch.testing.assert_close(alternating(30)[:, None] * chebyshev(x, 30), expected, rtol=0, atol=1e-12)
    assert chebyshev(x, 1).tolist() == [[1.0] * 41]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 64, 256])
def test_the_series_is_the_features(kind, count):
    phi_of = FourierFeatures.draw(kind, 1, count, seed=3)
    short = phi_of.expansion
    x = torch.linspace(-REACH, REACH, 99, dtype=torch.float64)
    kept = torch.isin(phi_of.frequency[0], short.frequency)
    assert phi_of.amplitude[~kept].square().sum() < 1e-8  # of a kernel that is 1 at 0
    features = phi_of(x[:, None], 1.0)[:, kept]
    torch.testing.assert_close(
        short.series @ chebyshev(x / REACH, short.series.shape[1]), features.T, rtol=0, atol=3e-8
    )
    far = torch.tensor([-40.0, 0.0, 3.5], dtype=torch.float64)
    expected = phi_of(far[:, None], 1.0) - phi_of(torch.zeros(1, 1, dtype=torch.float64), 1.0)
    torch.testing.assert_close(short.beyond(far), expected[:, kept].T, rtol=0, atol=1e-12)


def test_a_series_is_short_and_half_of_a_quadrature_rule_weighs_nothing():
    assert FourierFeatures.draw("random", 1, 256, seed=0).expansion.series.shape == (256, 23)
    assert FourierFeatures.draw("quadrature", 1, 64, seed=0).expansion.series.shape == (32, 29)


@pytest.mark.parametrize("center", [True, False])
def test_the_gold_factor_has_the_gram_matrix_of_the_features_and_few_columns(center):
    gold = 20 * normal(300, seed=1)
    gold[:3] *= 40
    phi_of = FourierFeatures.draw("random", 1, 256, seed=0)
    features = phi_of(gold.double()[:, None], 50.0)
    if center:
        features = features - features.mean(0)
    factor = gold_factors(gold[None], phi_of, 50.0, center)[0].double()
    torch.testing.assert_close(factor @ factor.T, features @ features.T, rtol=0, atol=1e-6)
    assert factor.shape[1] < 20


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    count=st.sampled_from([1, 2, 5, 40]),
    d=st.integers(2, 70),
    tokens=st.integers(1, 9),
    chunk=st.sampled_from([None, 1, 4]),
    center=st.booleans(),
    sigma=st.sampled_from([0.3, 2.0, 50.0]),
    outliers=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@example("random", 1, 2, 1, None, False, 0.3, 3, 23)
def test_coordinate_scores_with_outliers_anywhere(kind, count, d, tokens, chunk, center, sigma, outliers, seed):
    hidden, gold = normal(tokens, d, seed=seed), normal(d, seed=seed + 1)
    hidden[:, :outliers] *= 500
    gold[d - outliers :] *= 500
    options: dict[str, Any] = {
        "num_features": count,
        "sigma": sigma,
        "features": kind,
        "center": center,
        "seed": seed,
    }
    plain = plain_scores(hidden, gold, **options)
    scores = coordinate_scores(hidden, gold, chunk=chunk, **options).double()
    # Centred features may cancel each other, and a cosine in fp32 is `off` by the rounding of its angle: the features,
    # whose norm is at most sqrt(2 d), by sqrt(2 d) off, their product M by 4 d off, the score |M|^2 / (d - 1)^2 by:
    scale = plain_scores(hidden, gold, **{**options, "center": False}).max().item()
    frequency = FourierFeatures.draw(kind, 1, count, seed=seed).frequency.abs().max().item()
    off = torch.finfo(torch.float32).eps / 2 * frequency * torch.cat([hidden, gold[None]]).abs().max().item() / sigma
    rounding = 8 * d / (d - 1) * off * math.sqrt(scale) + (4 * d / (d - 1) * off) ** 2
    torch.testing.assert_close(scores, plain, rtol=2e-4, atol=1e-6 * scale + rounding)


@pytest.mark.slow
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("chunk", [None, 3])
def test_gold_states_together_are_each_alone_and_exact(monkeypatch, center, chunk):
    """Tokens in any order, each with one of many gold states, whose outliers, ranks and faults differ."""
    gold = 20 * normal(7, 90, seed=1)
    gold[0, :5], gold[1, 70:], gold[2] = 8 * gold[0, :5], 8 * gold[1, 70:], 20 * gold[2].sign()
    gold[3], gold[4, 7], gold[5, 0] = 1.5, float("nan"), float("inf")
    hidden, which = 20 * normal(40, 90, seed=2), torch.arange(40) * 3 % 7
    hidden[::4, 30:33] *= 8
    hidden[8], hidden[9, 1], hidden[10, 2] = 2.5, float("nan"), -float("inf")
    options: dict[str, Any] = {"num_features": 256, "sigma": 50.0, "center": center, "features": "quadrature"}
    phi_of = FourierFeatures.draw("quadrature", 1, 256, seed=0)
    if chunk:
        monkeypatch.setattr(mi, "CACHE_ELEMENTS", 1)  # one gold state at a time
    factors = gold_factors(gold, phi_of, 50.0, center)
    assert len(gold_factors(gold[:0], phi_of, 50.0, center)) == 0
    scores = factor_scores(hidden, factors, which, phi_of, token_bandwidths(hidden, 50.0), center, chunk)
    alone = torch.cat([coordinate_scores(hidden[[t]], gold[q], **options) for t, q in enumerate(which)])
    scale = alone.max().item()
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-6 * scale)
    assert (scores[[8, 9, 10]] == 0).tolist() == [center, True, True]
    assert (scores[(which == 4) | (which == 5)] == 0).all()
    if center:
        assert (scores[which == 3] == 0).all()
        exact = exact_hsic(hidden[:, :, None], gold[which][:, :, None], sigma=50.0)
        torch.testing.assert_close(scores, exact, rtol=1e-3, atol=1e-4 * scale)


def test_rounding_of_a_constant_gold_state_is_no_rank():
    phi_of = FourierFeatures.draw("quadrature", 1, 256, seed=0)
    gold = torch.full((1, 90), 1.5, dtype=torch.float64)
    gold[0, ::2] = math.nextafter(1.5, 2)
    assert gold_factors(gold, phi_of, 50.0, True).shape[2] == 0
    gold[0, ::2] += 1e-9  # which varies, however little
    assert gold_factors(gold, phi_of, 50.0, True).shape[2] >= 1


def test_chunks_fit_the_cache(monkeypatch):
    hidden, gold = planted()
    whole = coordinate_scores(hidden, gold, num_features=32, sigma=50.0)
    monkeypatch.setattr(mi, "CACHE_ELEMENTS", 1)  # one token at a time
    torch.testing.assert_close(coordinate_scores(hidden, gold, num_features=32, sigma=50.0), whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("center", [True, False])
def test_mutual_information_is_differentiable(center: bool) -> None:
    """fast_hsic has the gradient of finite differences with respect to both states, and it is not zero."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 7, 3, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def score(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fast_hsic(x, y, num_features=6, sigma=1.5, seed=1, center=center)  # (2,)

    assert torch.autograd.gradcheck(score, (x, y))
    for gradient in torch.autograd.grad(score(x, y).sum(), (x, y)):
        assert float(gradient.abs().min()) > 0
