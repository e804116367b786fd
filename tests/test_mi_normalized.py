"""The normalised HSIC against n-by-n kernel matrices and their inverses, as the peaks work writes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aipo.config.sections import Features, MIConfig
from aipo.mi import FourierFeatures, gold_factors, token_bandwidths
from aipo.mi_normalized import normalized_scores
from aipo.scorer import TokenScorer

EPSILON = 1e-4  # not the default, which a scorer that ignores its config would take
d = 90


def ratio(K: Tensor) -> Tensor:
    """R = HKH (HKH + epsilon n I)^-1, (n, n)."""
    n = len(K)
    H = torch.eye(n, dtype=K.dtype) - 1 / n
    K = H @ K @ H
    return K @ torch.linalg.inv(K + EPSILON * n * torch.eye(n, dtype=K.dtype))


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """(n,) -> (n, n)."""
    return torch.exp(-(x[:, None] - x).square() / (2 * sigma**2))


def states() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in any order, some with coordinates far out, each with one of four gold states."""
    draw = torch.Generator().manual_seed(0)
    gold, hidden = 20 * torch.randn(4, d, generator=draw), 20 * torch.randn(12, d, generator=draw)
    which = torch.arange(12) * 3 % 4
    hidden[:6] = gold[which[:6]] + hidden[:6] / 5
    hidden[::3, 30:33] *= 10
    gold[1, 40] = 400.0
    return hidden, gold, which


def scores(features: Features, D: int, hidden: Tensor, gold: Tensor, which: Tensor, chunk: int | None) -> Tensor:
    phi_of = FourierFeatures.draw(features, 1, D, seed=3)
    factors = gold_factors(gold, phi_of, 50.0, True, EPSILON * d)
    bandwidth = token_bandwidths(hidden, 50.0)
    return normalized_scores(hidden, factors, which, phi_of, bandwidth, True, EPSILON * d, chunk)


@pytest.mark.parametrize("chunk", [None, 5])
def test_quadrature_features_give_the_exact_normalised_hsic(chunk: int | None) -> None:
    hidden, gold, which = states()
    found = scores("quadrature", 1024, hidden, gold, which, chunk)
    for x, q, score in zip(hidden.double(), which, found):
        exact = torch.trace(ratio(gaussian(x, 50.0)) @ ratio(gaussian(gold[q].double(), 50.0)))
        assert score.item() == pytest.approx(exact.item(), rel=1e-5)
    assert found[:6].min() > found[6:].max()  # the tokens that carry their gold state


def test_random_features_give_that_of_their_own_kernel() -> None:
    hidden, gold, which = states()
    phi_of = FourierFeatures.draw("random", 1, 64, seed=3)
    for x, q, score in zip(hidden.double(), which, scores("random", 64, hidden, gold, which, None)):
        phi_x, phi_y = phi_of(x[:, None], 50.0), phi_of(gold[q].double()[:, None], 50.0)  # (d, D)
        plain = torch.trace(ratio(phi_x @ phi_x.T) @ ratio(phi_y @ phi_y.T))
        assert score.item() == pytest.approx(plain.item(), rel=1e-5)


def test_a_state_with_itself_counts_its_directions() -> None:
    """tr R^2: all eigenvalues of R lie below 1."""
    _, gold, _ = states()
    own = scores("quadrature", 256, gold, gold, torch.arange(4), None)
    for state, score in zip(gold.double(), own):
        share = torch.linalg.eigvalsh(ratio(gaussian(state, 50.0)))
        assert score.item() == pytest.approx(share.square().sum().item(), rel=1e-5)


def test_what_cannot_be_measured_scores_0() -> None:
    hidden, gold, which = states()
    usual = scores("random", 64, hidden, gold, which, None)
    hidden[0, 3], hidden[1, 5], hidden[2] = torch.nan, torch.inf, 7.0
    gold[3] = torch.nan
    found = scores("random", 64, hidden, gold, which, None)
    assert found[:3].tolist() == [0, 0, 0]
    assert (found[which == 3] == 0).all()
    rest = (which != 3) & (torch.arange(12) > 2)
    torch.testing.assert_close(found[rest], usual[rest])
    assert scores("random", 64, hidden[:0], gold, which[:0], None).shape == (0,)


def test_the_scorer_of_a_run() -> None:
    hidden, gold, which = states()
    order = which.argsort(stable=True)
    scorer = TokenScorer(MIConfig(normalized="cca", num_features=64, epsilon=EPSILON), seed=3)
    scorer.prepare(gold)
    found = scorer.score(hidden[order], gold, torch.bincount(which))
    torch.testing.assert_close(found, scores("random", 64, hidden, gold, which, None)[order])
    assert scorer.local
