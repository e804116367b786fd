"""The objective against plain Python loops (tests/reference.py), in float64, and against cases worked by hand."""

from __future__ import annotations

import math
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aipo.advantage import group_advantages
from aipo.config.sections import LossConfig, MaskConfig
from aipo.loss import (
    AGGREGATIONS,
    RATIOS,
    LossInputs,
    binary_divergence,
    importance_weights,
    kl_priority,
    loss_terms,
    policy_loss,
)
from aipo.mask import MaskRule
from tests import reference

INF, NAN = math.inf, math.nan


def batch(seed: int, rows: int = 4, width: int = 7, spread: float = 0.4) -> dict[str, Tensor]:
    """Ragged rows; the ratios fall on both sides of both clipping bounds."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    lengths = torch.randint(0, width + 1, (rows,), generator=random)
    logp_old = -normal(rows, width).abs()
    inside = torch.arange(width) < lengths[:, None]
    return {
        "logp": (logp_old + spread * normal(rows, width)).clamp(max=-1e-3),
        "logp_old": logp_old,
        "logp_ref": logp_old + 0.5 * normal(rows, width),
        "advantages": normal(rows),
        "mask": inside & (torch.rand(rows, width, generator=random) < 0.6),
        "importance_weight": normal(rows, width).abs(),
        "lengths": lengths,
        "kl_weight": torch.rand(rows, width, generator=random, dtype=torch.float64),
        "entropy": normal(rows, width).abs(),
        "inclusion": torch.rand(rows, width, generator=random, dtype=torch.float64).clamp(min=0.1),
    }


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    if not loss.requires_grad:  # nothing selected: the loops touch no tensor
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)


def compare(b: dict[str, Tensor], **options: Any) -> None:
    """Value, and gradients to log-probabilities and entropies; no weight may have one."""
    results = []
    for function in (policy_loss, reference.objective):
        logp, entropy, kl_weight, importance_weight = (
            b[k].clone().requires_grad_() for k in ("logp", "entropy", "kl_weight", "importance_weight")
        )
        given = {"entropy": entropy, "kl_weight": kl_weight, "importance_weight": importance_weight}
        given = {k: v for k, v in given.items() if k in options}
        out = function(logp, b["logp_old"], b["advantages"], b["mask"], **{**options, **given})
        loss = out[0] if isinstance(out, tuple) else out
        results.append((loss.detach(), *gradients(loss, logp, entropy)))
        assert all((g == 0).all() for g in gradients(loss, kl_weight, importance_weight))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    assert all((gradient[~b["mask"]] == 0).all() for gradient in results[0][1:])


# --- against loops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("per_token", [False, True], ids=["A per row", "A per token"])
def test_value_and_gradient(ratio: str, aggregation: str, per_token: bool) -> None:
    b = batch(seed=4)
    if per_token:
        b["advantages"] = b["advantages"][:, None] + 0.5 * b["logp_ref"]
    rule = {"ratio": ratio, "aggregation": aggregation, "max_length": 9, "clip_low": 0.1, "clip_high": 0.4}
    kl = {"kl_beta": 0.04, "logp_ref": b["logp_ref"]}
    variants: list[dict[str, Any]] = [
        {"lengths": b["lengths"]},
        {"importance_weight": b["importance_weight"]},
        kl,
        {**kl, "kl_weight": b["kl_weight"]},
        {"entropy": b["entropy"], "entropy_weight": 0.05},
        {**kl, "inclusion": b["inclusion"], "lengths": b["lengths"]},
    ]
    for options in variants:
        compare(b, **rule, **options)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    width=st.integers(1, 9),
    spread=st.sampled_from([0.0, 0.3, 3.0]),
    ratio=st.sampled_from(RATIOS),
    aggregation=st.sampled_from(AGGREGATIONS),
    kl_beta=st.sampled_from([0.0, 0.1]),
    clip_low=st.sampled_from([0.0, 0.2, 1.0, 5.0]),
    clip_high=st.sampled_from([0.0, 0.28, 4.0]),
    everything=st.booleans(),
    constant_group=st.booleans(),
)
@example(  # a sum in which rounding shows
    seed=34410,
    rows=2,
    width=3,
    spread=0.0,
    ratio="soft_gate",
    aggregation="token",
    kl_beta=0.0,
    clip_low=0.0,
    clip_high=0.0,
    everything=True,
    constant_group=False,
)
def test_value_and_gradient_of_any_shape(
    seed: int,
    rows: int,
    width: int,
    spread: float,
    ratio: str,
    aggregation: str,
    kl_beta: float,
    clip_low: float,
    clip_high: float,
    everything: bool,
    constant_group: bool,
) -> None:
    b = batch(seed, rows, width, spread)
    if spread == 0:  # strictly on-policy: both branches of the minimum tie, their gradient is that of the ratio
        b["logp"] = b["logp_old"].clone()
    if constant_group:
        b["advantages"][: rows // 2 + 1] = 0
    options: dict[str, Any] = {k: b[k] for k in ("importance_weight", "kl_weight", "entropy")}
    compare(
        b,
        ratio=ratio,
        aggregation=aggregation,
        kl_beta=kl_beta,
        logp_ref=b["logp_ref"],
        max_length=width,
        clip_low=clip_low,
        clip_high=clip_high,
        **({**options, "entropy_weight": 0.05} if everything else {}),
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_single_tokens_make_the_sequence_ratio_the_token_ratio(aggregation: str) -> None:
    b = batch(5)
    b["mask"] = torch.arange(7) == torch.tensor([0, 3, 6, 2])[:, None]
    args = [b[k] for k in ("logp", "logp_old", "advantages", "mask")]
    losses = [policy_loss(*args, ratio=r, aggregation=aggregation, max_length=7)[0] for r in ("token", "sequence")]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_on_policy_the_ratios_have_one_gradient(aggregation: str) -> None:
    b = batch(6)
    results = []
    for ratio in RATIOS:
        logp = b["logp"].clone().requires_grad_()
        loss, _ = policy_loss(
            logp, b["logp"], b["advantages"], b["mask"], ratio=ratio, aggregation=aggregation, max_length=7
        )
        results.append(torch.autograd.grad(loss, logp)[0])
    assert results[0].abs().sum() > 0
    for result in results[1:]:
        torch.testing.assert_close(results[0], result, rtol=1e-12, atol=1e-15)


# --- by hand ------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    # ratios 1.5, 0.5 / 1.5, 0.5; A = 1 / -2; eps 0.2, 0.28: gains 1.28, 0.5 / -3, -1.6
    ratios = torch.tensor([[1.5, 0.5], [1.5, 0.5]], dtype=torch.float64)
    mask = torch.ones(2, 2, dtype=torch.bool)
    args = (ratios.log(), torch.zeros_like(ratios), torch.tensor([1.0, -2.0]), mask)
    loss, metrics = policy_loss(*args)
    assert loss.item() == pytest.approx(-((1.28 + 0.5) / 2 + (-3 - 1.6) / 2) / 2)
    assert metrics["clip_fraction"] == pytest.approx(2 / 4)  # 1.5 of A > 0 and 0.5 of A < 0
    assert metrics["selected"] == 4

    mask[0, 0] = False  # 0.5 alone in its sequence; then -2.3
    assert policy_loss(*args)[0].item() == pytest.approx(-(0.5 - 2.3) / 2)
    assert policy_loss(*args, aggregation="token")[0].item() == pytest.approx(-(0.5 - 3 - 1.6) / 3)
    assert policy_loss(*args, aggregation="constant", max_length=10)[0].item() == pytest.approx(4.1 / 20)
    assert policy_loss(*args, aggregation="all_tokens")[0].item() == pytest.approx(4.1 / 4)
    lengths = torch.tensor([3, 5])
    assert policy_loss(*args, aggregation="all_tokens", lengths=lengths)[0].item() == pytest.approx(4.1 / 8)
    assert policy_loss(*args)[1]["clip_fraction"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("sign", "clipped"), [(1.0, [1.5, 1.4]), (-1.0, [0.5])])
def test_clip_fraction_counts_where_the_bound_decides(sign: float, clipped: list[float]) -> None:
    ratios = [1.5, 1.4, 1.1, 0.9, 0.5]
    logp, mask = torch.tensor([ratios]).log(), torch.ones(1, 5, dtype=torch.bool)
    for kept in range(6):
        mask[0, kept:] = False
        metrics = policy_loss(logp, torch.zeros(1, 5), torch.tensor([sign]), mask)[1]
        assert metrics["clip_fraction"] == pytest.approx(len(set(clipped) & set(ratios[:kept])) / max(kept, 1))
        mask[:] = True


def test_k3_by_hand() -> None:
    logp, logp_ref = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.25, 0.2]]).log()
    args = (logp, logp, torch.zeros(1), torch.ones(1, 2, dtype=torch.bool))
    loss, metrics = policy_loss(*args, logp_ref=logp_ref, kl_beta=0.1)
    k3 = 0.5 - math.log(0.5) - 1
    assert metrics["kl"] == pytest.approx(k3 / 2, rel=1e-5)
    assert loss.item() == pytest.approx(0.1 * k3 / 2, rel=1e-5)
    free, measured = policy_loss(*args, logp_ref=logp_ref)  # measured, not trained on
    assert free.item() == 0
    assert measured["kl"] == pytest.approx(k3 / 2, rel=1e-5)


def test_clipped_tokens_have_no_gradient() -> None:
    logp = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    policy_loss(logp, torch.zeros(1, 4), advantages, torch.ones(1, 4, dtype=torch.bool))[0].backward()
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, torch.tensor([[0.0, -0.5, 1.5, 0.0]]) / 4)


def hand(ratios: list[list[float]], advantages: list[float], **options: Any) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient by log pi, metrics, where pi_old is 1/4 and pi the given multiples of it; NaN is padding."""
    rho = torch.tensor(ratios, dtype=torch.float64)
    logp = (rho / 4).log().requires_grad_()
    old = torch.full_like(rho, 0.25).log()
    loss, metrics = policy_loss(logp, old, torch.tensor(advantages, dtype=torch.float64), ~rho.isnan(), **options)
    return loss.item(), torch.autograd.grad(loss, logp)[0], metrics


def test_gspo_by_hand() -> None:
    # s_1 = sqrt(2 * 1/2) = 1, inside; s_2 = (8 * 1 * 1)^(1/3) = 2, clipped for A > 0; s_3 = 1/2, not clipped for A > 0
    ratios = [[2.0, 0.5, NAN], [8.0, 1.0, 1.0], [0.5, NAN, NAN]]
    loss, gradient, metrics = hand(ratios, [1.0, 2.0, -1.0], ratio="sequence", clip_low=0.2, clip_high=0.28)
    # gains: 1 * 1; 1.28 * 2; min(-0.5, -0.8)
    assert loss == pytest.approx(-(1 + 2.56 - 0.8) / 3)
    # only the first sequence is inside its bounds: s A / (its 2 tokens) / (3 sequences) for each token
    torch.testing.assert_close(gradient, -torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]]).double() / 6)
    assert metrics["clip_fraction"] == pytest.approx(4 / 6)
    # by tokens, where both tokens of the first sequence would have been clipped or left alone one by one
    loss, gradient, _ = hand(ratios[:1], [1.0], ratio="sequence", aggregation="token")
    assert loss == pytest.approx(-1)
    torch.testing.assert_close(gradient[0, :2], torch.tensor([-0.5, -0.5]).double())
    loss, gradient, _ = hand(ratios[:1], [1.0], ratio="token", aggregation="token")
    assert loss == pytest.approx(-(1.28 + 0.5) / 2)
    torch.testing.assert_close(gradient[0, :2], torch.tensor([0.0, -0.25]).double())


def test_gspo_averages_over_selected_tokens_only() -> None:
    whole, gradient, _ = hand([[1.1, NAN, 0.9]], [1.0], ratio="sequence")
    short, expected, _ = hand([[1.1, 0.9]], [1.0], ratio="sequence")
    assert whole == pytest.approx(short)
    assert whole == pytest.approx(-math.sqrt(0.99))
    torch.testing.assert_close(gradient[0, [0, 2]], expected[0])


def test_cispo_by_hand() -> None:
    # weights 1.28 (clipped), 1.1, 0.2 (unbounded below) and for A = -2: 1.28, 0.5
    ratios, advantages = [[2.0, 1.1, 0.2], [3.0, 0.5, NAN]], [1.0, -2.0]
    loss, gradient, metrics = hand(
        ratios, advantages, ratio="clipped_weight", aggregation="token", clip_low=1.0, clip_high=0.28
    )
    log = math.log
    gains = [1.28 * log(2 / 4), 1.1 * log(1.1 / 4), 0.2 * log(0.2 / 4), -2 * 1.28 * log(3 / 4), -2 * 0.5 * log(0.5 / 4)]
    assert loss == pytest.approx(-sum(gains) / 5)
    # every token keeps a gradient, w A, clipped or not
    expected = -torch.tensor([[1.28, 1.1, 0.2], [-2.56, -1.0, 0.0]]).double() / 5
    torch.testing.assert_close(gradient, expected)
    assert metrics["clip_fraction"] == pytest.approx(2 / 5)
    _, bounded, metrics = hand(ratios, advantages, ratio="clipped_weight", aggregation="token", clip_low=0.2)
    torch.testing.assert_close(bounded, -torch.tensor([[1.28, 1.1, 0.8], [-2.56, -1.6, 0.0]]).double() / 5)
    assert metrics["clip_fraction"] == pytest.approx(4 / 5)


def test_sapo_by_hand() -> None:
    # sigmoid(tau (2 - 1)) 4 / tau with tau 1 | 2 where A is not positive; slope 4 s (1 - s) rho A by log pi
    ratios, advantages = [[2.0, 1.0], [2.0, NAN]], [1.0, -3.0]
    loss, gradient, metrics = hand(ratios, advantages, ratio="soft_gate", gate_positive=1.0, gate_negative=2.0)
    up, down = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert loss == pytest.approx(-((4 * up + 4 / 2) / 2 - 3 * 2 * down) / 2)
    expected = [[4 * up * (1 - up) * 2 / 2, 1 / 2], [-3 * 4 * down * (1 - down) * 2, 0]]
    torch.testing.assert_close(gradient, -torch.tensor(expected).double() / 2)
    assert metrics["clip_fraction"] == 0


def test_dppo_by_hand() -> None:
    # pi_old 1/4: the total variation is |rho - 1| / 4, so 0.15 lies at rho 0.4 and 1.6
    ratios = [[1.5, 1.7, 0.3, 0.5], [1.7, 1.5, 0.3, 0.5]]
    loss, gradient, metrics = hand(ratios, [1.0, -2.0], ratio="tv_mask", aggregation="token", divergence=0.15)
    # A > 0 stops at 1.7 alone, though 0.3 is as far away: it comes back; A < 0 stops at 0.3
    assert loss == pytest.approx(-(1.5 + 0.3 + 0.5 - 2 * (1.7 + 1.5 + 0.5)) / 8)
    torch.testing.assert_close(gradient, -torch.tensor([[1.5, 0, 0.3, 0.5], [-3.4, -3.0, 0, -1.0]]).double() / 8)
    assert metrics["clip_fraction"] == pytest.approx(2 / 8)
    # KL of coins 1/4 and 1.5/4: log(2/3)/4 + 3/4 log(0.75/0.625) = 0.0354; and 1.7/4: 0.0667
    _, gradient, metrics = hand(ratios[:1], [1.0], ratio="kl_mask", aggregation="token", divergence=0.05)
    assert (gradient[0] == 0).tolist() == [False, True, False, False]
    _, gradient, metrics = hand(ratios[:1], [1.0], ratio="kl_mask", aggregation="token", divergence=0.03)
    assert (gradient[0] == 0).tolist() == [True, True, False, False]
    assert metrics["clip_fraction"] == pytest.approx(2 / 4)


def test_a_rare_token_may_grow_where_a_clip_would_stop_it() -> None:
    """The paper's case against clips: 1e-5 to 1e-3 is a ratio of 100 and moves nothing, 0.99 to 0.8 moves much."""
    logp = torch.tensor([[1e-3, 0.8]]).log().requires_grad_()
    old, mask = torch.tensor([[1e-5, 0.99]]).log(), torch.ones(1, 2, dtype=torch.bool)
    for ratio, bound, stopped in (("token", 0.15, [True, False]), ("tv_mask", 0.15, [False, True])):
        options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "divergence": bound, "ratio": ratio}
        loss, _ = policy_loss(logp, old, torch.tensor([[1.0, -1.0]]), mask, **options)
        assert (torch.autograd.grad(loss, logp)[0][0] == 0).tolist() == stopped


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-30, 1), st.floats(1e-30, 1))  # a token that was drawn has a probability
def test_binary_divergence_against_loops(p: float, q: float) -> None:
    logs = [torch.tensor([[value]], dtype=torch.float64).log() for value in (p, q)]
    tv, kl = (binary_divergence(*logs, kl=kl) for kl in (False, True))
    assert tv.item() == pytest.approx(reference.total_variation(p, q), abs=1e-9)
    assert kl.item() == pytest.approx(reference.bernoulli_kl(p, q), rel=1e-6, abs=1e-9)
    assert tv.item() <= math.sqrt(max(kl.item(), 0) / 2) + 1e-6  # Pinsker


def test_an_old_policy_is_the_engine_if_it_is_said_to_be() -> None:
    b = batch(7)
    engine = b["logp_old"] + 0.3 * b["logp_ref"]
    inputs = LossInputs(b["logp"], b["logp_old"], b["advantages"], b["mask"], logp_engine=engine)
    config = LossConfig(ratio="tv_mask", old_policy="engine", kl_beta=0.0, aggregation="token")
    terms = loss_terms(inputs, config)
    expected = reference.objective(b["logp"], engine, b["advantages"], b["mask"], ratio="tv_mask", aggregation="token")
    torch.testing.assert_close(terms.total / terms.denominator, expected, rtol=1e-6, atol=1e-9)
    gap = (b["logp_old"] - engine).abs()[b["mask"]].sum()  # what is logged stays the engine against the trainer
    assert terms.sums["mismatch_gap"].item() == pytest.approx(gap.item(), rel=1e-5)
    with pytest.raises(ValueError, match="logp_engine"):
        loss_terms(LossInputs(b["logp"], b["logp_old"], b["advantages"], b["mask"]), config)


# --- Horvitz-Thompson ---------------------------------------------------------------------------------------------


def draws(rule: MaskRule, length: int) -> list[tuple[float, list[int]]]:
    """Every set of tokens that a rule can draw of a completion, with its chance, from the rule's definition."""
    if rule.rule == "random":
        size = max(1, round(rule.fraction * length))
        return [(1 / math.comb(length, size), list(c)) for c in combinations(range(length), size)]
    if rule.rule == "bernoulli":
        sets = [list(c) for size in range(length + 1) for c in combinations(range(length), size)]
        return [(rule.fraction ** len(s) * (1 - rule.fraction) ** (length - len(s)), s) for s in sets]
    cuts = range(min(rule.shortest, length), length + 1)
    return [(1 / len(cuts), list(range(cut))) for cut in cuts]


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [r for r in RATIOS if r != "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("keys", [("random", 0.4, 1), ("bernoulli", 0.3, 1), ("random_prefix", 1.0, 2)])
def test_drawn_tokens_are_unbiased_for_all_tokens(keys: tuple[Any, float, int], aggregation: str, ratio: str) -> None:
    """NAT: the expectation over all masks, exactly, of loss and gradient are those without a mask."""
    name, fraction, shortest = keys
    rule = MaskRule(MaskConfig(rule=name, fraction=fraction, shortest=shortest, reweight=True))
    b = batch(9, rows=2, width=5)
    lengths = torch.tensor([5, 3])
    logp = b["logp"].clone().requires_grad_()
    rest: dict[str, Any] = {"logp_ref": b["logp_ref"], "kl_beta": 0.1, "max_length": 6, "lengths": lengths}
    rest |= {"aggregation": aggregation, "ratio": ratio}
    mean = torch.zeros((), dtype=torch.float64)
    for (p, first), (q, second) in product(draws(rule, 5), draws(rule, 3)):
        mask = torch.zeros(2, 5, dtype=torch.bool)
        mask[0, first], mask[1, second] = True, True
        inclusion = rule.inclusion(lengths, 5).double()
        mean = mean + p * q * policy_loss(logp, b["logp_old"], b["advantages"], mask, inclusion=inclusion, **rest)[0]
    everything = torch.arange(5) < lengths[:, None]
    expected = policy_loss(logp, b["logp_old"], b["advantages"], everything, **rest)[0]
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients(mean, logp), gradients(expected, logp), rtol=1e-6, atol=1e-9)


# rewards 1, 0, 0, 0: mean 1/4, sample standard deviation 1/2; on-policy, 1, 2, 3 and 2 tokens
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0])
ON_POLICY = [[1.0, NAN, NAN], [1.0, 1.0, NAN], [1.0, 1.0, 1.0], [1.0, 1.0, NAN]]


def test_grpo_by_hand() -> None:
    advantages = group_advantages(REWARDS, 4, normalize="std").tolist()
    high, low = 0.75 / (0.5 + 1e-6), -0.25 / (0.5 + 1e-6)
    loss, gradient, _ = hand(ON_POLICY, advantages, aggregation="sequence", clip_high=0.2)
    assert loss == pytest.approx(-(high + 3 * low) / 4, abs=1e-7)
    rows = [[high, 0, 0], [low / 2, low / 2, 0], [low / 3, low / 3, low / 3], [low / 2, low / 2, 0]]
    torch.testing.assert_close(gradient, -torch.tensor(rows).double() / 4, rtol=1e-6, atol=1e-8)


def test_dr_grpo_by_hand() -> None:
    # no division by the standard deviation nor by a sequence's own length: max_length 10 instead
    advantages = group_advantages(REWARDS, 4).tolist()
    loss, gradient, _ = hand(ON_POLICY, advantages, aggregation="constant", max_length=10)
    assert loss == pytest.approx(-(1 * 0.75 - 7 * 0.25) / (4 * 10))
    rows = [[0.75, 0, 0], [-0.25, -0.25, 0], [-0.25, -0.25, -0.25], [-0.25, -0.25, 0]]
    torch.testing.assert_close(gradient, -torch.tensor(rows).double() / 40)


def test_dapo_by_hand() -> None:
    advantages = group_advantages(2 * REWARDS - 1, 4, normalize="std").tolist()  # rewards +-1: the same advantages
    high, low = 1.5 / (1 + 1e-6), -0.5 / (1 + 1e-6)
    ratios = [[1.5, NAN, NAN], [0.5, 1.0, NAN], [1.25, 1.0, 1.0], [1.5, 1.0, NAN]]
    loss, gradient, _ = hand(ratios, advantages, aggregation="token", clip_low=0.2, clip_high=0.28)
    # clipped: 1.5 with A > 0 to 1.28, 0.5 with A < 0 to 0.8; not 1.5 with A < 0
    assert loss == pytest.approx(-(1.28 * high + (0.8 + 1 + 1.25 + 1 + 1 + 1.5 + 1) * low) / 8, abs=1e-7)
    rows = [[0, 0, 0], [0, low, 0], [1.25 * low, low, low], [1.5 * low, low, 0]]
    torch.testing.assert_close(gradient, -torch.tensor(rows).double() / 8, rtol=1e-6, atol=1e-8)


def test_self_reward_by_hand() -> None:
    # IIB-LPO: -0.005 mean(A_t H_t) with H = 2, 1 | 4 and A = 1 | -3, averaged as the rest is
    logp = torch.zeros(2, 2, dtype=torch.float64)
    entropy = torch.tensor([[2.0, 1.0], [4.0, INF]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    args = (logp, logp, torch.tensor([1.0, -3.0]).double(), mask)
    plain = policy_loss(*args, aggregation="token")[0]
    loss = policy_loss(*args, aggregation="token", entropy=entropy, entropy_weight=0.005)[0]
    assert (loss - plain).item() == pytest.approx(-0.005 * (2 + 1 - 12) / 3)
    torch.testing.assert_close(
        torch.autograd.grad(loss, entropy)[0], -0.005 * torch.tensor([[1.0, 1.0], [-3.0, 0.0]]).double() / 3
    )
    by_sequence = policy_loss(*args, entropy=entropy, entropy_weight=0.005)[0] - policy_loss(*args)[0]
    assert by_sequence.item() == pytest.approx(-0.005 * (1.5 - 12) / 2)
    assert torch.equal(policy_loss(*args, entropy=entropy)[0], policy_loss(*args)[0])  # weight 0: not in the loss


def test_kl_priority_by_hand() -> None:
    entropy = torch.tensor([[0.0, math.log(2), math.log(4), 5.0, -1e-6]]).double()
    torch.testing.assert_close(kl_priority(entropy, 4, 3), torch.tensor([[1, 1 / 8, 0, 0, 1]]).double())
    assert kl_priority(entropy, 4, 0)[0, :2].tolist() == [1, 1]  # power 0: plain KL
    assert not kl_priority(entropy.requires_grad_(), 4, 3).requires_grad
    for vocab_size, power in ((1, 1.0), (4, -1.0)):
        with pytest.raises(ValueError, match="vocab_size"):
            kl_priority(entropy, vocab_size, power)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 12), min_size=1, max_size=9), st.integers(2, 151_936), st.floats(0, 150))
def test_kl_priority_against_loops(entropy: list[float], vocab_size: int, power: float) -> None:
    actual = kl_priority(torch.tensor([entropy], dtype=torch.float64), vocab_size, power)
    expected = torch.tensor([reference.kl_priority(entropy, vocab_size, power)], dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    assert ((actual >= 0) & (actual <= 1)).all()


def test_kl_weights_by_hand() -> None:
    logp, logp_ref = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.25]]).log()
    args = (logp, logp, torch.zeros(1), torch.ones(1, 2, dtype=torch.bool))
    loss, metrics = policy_loss(*args, logp_ref=logp_ref, kl_beta=0.1, kl_weight=torch.tensor([[1.0, 0.25]]))
    k3 = 0.5 - math.log(0.5) - 1
    assert loss.item() == pytest.approx(0.1 * k3 * 1.25 / 2, rel=1e-5)
    assert metrics["kl"] == pytest.approx(k3, rel=1e-5)  # as measured, not as weighted


# --- what must not count ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("garbage", [INF, -INF, NAN, 1e30])
def test_values_outside_the_mask_are_never_read(ratio: str, aggregation: str, garbage: float) -> None:
    b = batch(3)
    b["advantages"] = b["advantages"][:, None].expand_as(b["logp"])
    options: dict[str, Any] = {"aggregation": aggregation, "kl_beta": 0.1, "max_length": 7, "ratio": ratio}
    dirty = {k: torch.where(b["mask"], v, garbage) for k, v in b.items() if k not in ("mask", "lengths")}
    outcomes = []
    for values in (b, dirty):
        logp, entropy = values["logp"].clone().requires_grad_(), values["entropy"].clone().requires_grad_()
        loss, metrics = policy_loss(
            logp,
            values["logp_old"],
            values["advantages"],
            b["mask"],
            logp_ref=values["logp_ref"],
            importance_weight=values["importance_weight"],
            kl_weight=values["kl_weight"],
            entropy=entropy,
            entropy_weight=0.1,
            **options,
        )
        outcomes.append((loss, torch.stack(torch.autograd.grad(loss, (logp, entropy))), metrics))
    (loss, gradient, metrics), (dirty_loss, dirty_gradient, dirty_metrics) = outcomes
    assert torch.equal(loss, dirty_loss)
    assert torch.equal(gradient, dirty_gradient)
    assert metrics == dirty_metrics
    assert (dirty_gradient[:, ~b["mask"]] == 0).all()


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_empty_mask_is_zero(aggregation: str, ratio: str) -> None:
    b = batch(1)
    logp = torch.full_like(b["logp"], NAN).requires_grad_()
    nothing = torch.zeros_like(b["mask"])
    loss, metrics = policy_loss(
        logp,
        b["logp_old"],
        b["advantages"],
        nothing,
        logp_ref=b["logp_ref"],
        kl_beta=0.1,
        aggregation=aggregation,
        ratio=ratio,
        max_length=7,
        lengths=torch.zeros(4, dtype=torch.long),
        kl_weight=torch.full_like(b["logp"], NAN),
        entropy=torch.full_like(b["logp"], NAN),
        entropy_weight=0.1,
    )
    loss.backward()
    assert loss.item() == 0
    assert logp.grad is not None
    assert (logp.grad == 0).all()
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_batch_without_rows_is_zero(ratio: str) -> None:
    """As the filler that keeps ranks in step."""
    logp = torch.zeros(0, 1, requires_grad=True)
    loss, _ = policy_loss(logp, torch.zeros(0, 1), torch.zeros(0), torch.zeros(0, 1, dtype=torch.bool), ratio=ratio)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_sequence_that_selects_nothing_drops_out(ratio: str) -> None:
    b = batch(2, rows=3)
    b["mask"] = torch.tensor([[True] * 7, [False] * 7, [True] * 7])
    args = [b[k] for k in ("logp", "logp_old", "advantages", "mask")]
    torch.testing.assert_close(
        policy_loss(*args, ratio=ratio)[0], policy_loss(*[a[[0, 2]] for a in args], ratio=ratio)[0]
    )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("gap", [0.5, 200.0], ids=["usual ratio", "ratio beyond float32"])
def test_constant_groups_are_zero(aggregation: str, ratio: str, gap: float) -> None:
    logp = torch.full((2, 3), -0.5, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    args = (logp, logp.detach() - gap, torch.zeros(2), mask)
    loss, metrics = policy_loss(*args, aggregation=aggregation, ratio=ratio, max_length=3)
    loss.backward()
    assert loss.item() == 0
    assert logp.grad is not None
    assert (logp.grad == 0).all()
    assert all(math.isfinite(v) for v in metrics.values())


# --- one denominator ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from(RATIOS),
    st.booleans(),
)
def test_micro_batches_add_up(seed: int, parts: list[int], aggregation: str, ratio: str, reweighted: bool) -> None:
    b = batch(seed, rows=sum(parts))
    if not reweighted:
        del b["inclusion"]
    b["logp"].requires_grad_()
    options: dict[str, Any] = {"kl_beta": 0.1, "entropy_weight": 0.1, "aggregation": aggregation, "ratio": ratio}
    whole, _ = policy_loss(**b, **options, max_length=7)  # type: ignore[arg-type]
    rows = [{k: v.split(parts)[i] for k, v in b.items()} for i in range(len(parts))]
    terms = [loss_terms(LossInputs(**each), LossConfig(**options), max_length=7) for each in rows]
    loss = torch.stack([t.total for t in terms]).sum() / torch.stack([t.denominator for t in terms]).sum().clamp(min=1)
    torch.testing.assert_close(loss, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients(loss, b["logp"]), gradients(whole, b["logp"]), rtol=1e-9, atol=1e-12)
    assert sum(int(t.sums["selected"]) for t in terms) == int(b["mask"].sum())


def test_bad_arguments() -> None:
    args = (torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1, dtype=torch.bool))
    bad: list[dict[str, Any]] = [
        {"aggregation": "mean"},
        {"ratio": "word"},
        {"kl_beta": 0.1},
        {"aggregation": "constant"},
        {"entropy_weight": 0.1},
        {"inclusion": torch.ones(1, 1)},
    ]
    for options in bad:
        with pytest.raises(ValueError, match=next(iter(options))):
            policy_loss(*args, **options)


# --- importance correction ----------------------------------------------------------------------------------------

# ratios of ours to the engine's: 3, 0.5 | 3, 3 | the second token of the third row is not selected
OURS = torch.tensor([[0.6, 0.1], [0.6, 0.6], [0.2, 0.9]]).log()
ENGINE = torch.tensor([[0.2, 0.2], [0.2, 0.2], [0.2, 0.01]]).log()
SELECTED = torch.tensor([[True, True], [True, True], [True, False]])


def test_token_truncated_by_hand() -> None:
    weight, sums = importance_weights(OURS, ENGINE, SELECTED, rule="token_truncated", cap=2.0)
    torch.testing.assert_close(weight[SELECTED], torch.tensor([2.0, 0.5, 2.0, 2.0, 1.0]))
    assert sums["mismatch_weight"].item() == pytest.approx(7.5)
    assert sums["weight_max"].item() == pytest.approx(3)
    k3 = [r - math.log(r) - 1 for r in (3, 0.5, 3, 3, 1)]
    assert sums["mismatch_kl"].item() == pytest.approx(sum(k3), rel=1e-5)
    assert sums["mismatch_gap"].item() == pytest.approx(3 * math.log(3) + math.log(2), rel=1e-5)


def test_sequence_mask_by_hand() -> None:
    # geometric means: sqrt(1.5) = 1.22, 3, 1
    weight, sums = importance_weights(OURS, ENGINE, SELECTED, rule="sequence_mask", cap=2.0)
    assert weight[SELECTED].tolist() == [1, 1, 0, 0, 1]
    assert sums["mismatch_weight"].item() == 3
    for cap, kept in ((2.9, 0), (3.1, 1)):  # 3 is beyond and within, and so is 1/3
        for ours, engine in ((OURS, ENGINE), (ENGINE, OURS)):
            weight, _ = importance_weights(ours, engine, SELECTED, rule="sequence_mask", cap=cap)
            assert weight[SELECTED].tolist() == [1, 1, kept, kept, 1]


def test_icepop_by_hand() -> None:
    # ratios 3, 0.5 | 3, 3 | 1: inside [0.5, 2.9] lie 0.5 and 1, which weigh as much as they are
    bounds: dict[str, Any] = {"rule": "token_mask", "cap": 2.9, "floor": 0.499}
    weight, sums = importance_weights(OURS, ENGINE, SELECTED, **bounds)
    torch.testing.assert_close(weight[SELECTED], torch.tensor([0.0, 0.5, 0.0, 0.0, 1.0]))
    assert sums["mismatch_dropped"].item() == 3
    assert sums["weight_max"].item() == pytest.approx(3)
    weight, _ = importance_weights(OURS, ENGINE, SELECTED, rule="token_mask", cap=5.0, floor=0.6)
    torch.testing.assert_close(weight[SELECTED], torch.tensor([3.0, 0.0, 3.0, 3.0, 1.0]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(1, 6))
def test_icepop_against_loops(seed: int, alpha: float, beta: float) -> None:
    """The objective with its weights: dropped tokens stay in the denominator, clips are those of old to new."""
    b = batch(seed)
    inputs = LossInputs(b["logp"], b["logp_old"], b["advantages"], b["mask"], logp_engine=b["logp_ref"])
    terms = loss_terms(inputs, LossConfig(kl_beta=0.0), correction=("token_mask", beta, alpha))
    rows = [reference.icepop_weights(*row, alpha, beta) for row in zip(b["logp_old"].tolist(), b["logp_ref"].tolist())]
    expected = reference.objective(
        b["logp"], b["logp_old"], b["advantages"], b["mask"], importance_weight=torch.tensor(rows)
    )
    torch.testing.assert_close(terms.total / terms.denominator.clamp(min=1), expected, rtol=1e-5, atol=1e-6)


def test_no_correction_is_one_but_measured() -> None:
    weight, sums = importance_weights(OURS, ENGINE, SELECTED, rule="none", cap=2.0)
    assert (weight == 1).all()
    assert sums["weight_max"].item() == pytest.approx(3)
    with pytest.raises(ValueError, match="sometimes"):
        importance_weights(OURS, ENGINE, SELECTED, rule="sometimes", cap=2.0)


@pytest.mark.parametrize("rule", ["none", "token_truncated", "token_mask", "sequence_mask"])
def test_importance_reads_selected_tokens_only_and_carries_no_gradient(rule: str) -> None:
    ours = torch.where(SELECTED, OURS, NAN).requires_grad_()
    weight, sums = importance_weights(ours, torch.where(SELECTED, ENGINE, INF), SELECTED, rule=rule, cap=2.0)
    clean, clean_sums = importance_weights(OURS, ENGINE, SELECTED, rule=rule, cap=2.0)
    torch.testing.assert_close(weight[SELECTED], clean[SELECTED])
    torch.testing.assert_close(sums, clean_sums)
    assert not weight.requires_grad
    empty, empty_sums = importance_weights(OURS, ENGINE, torch.zeros_like(SELECTED), rule=rule, cap=2.0)
    assert empty.isfinite().all()
    assert all(v.item() == 0 for v in empty_sums.values())


@pytest.mark.parametrize("far", [29.0, -29.0])
def test_k3_is_cut_where_it_would_drown_a_batch(far: float) -> None:
    """The initial model finds the first token e^29 times as likely, or as unlikely."""
    logp = torch.tensor([[-30.0, -1.0]], requires_grad=True)
    loss, metrics = policy_loss(
        logp,
        logp.detach(),
        torch.zeros(1),
        torch.ones(1, 2, dtype=torch.bool),
        logp_ref=torch.tensor([[-30.0 + far, -2.0]]),
        kl_beta=1.0,
    )
    usual = math.exp(-1.0) + 1.0 - 1  # untouched
    cut = math.copysign(20.0, far)
    assert metrics["kl"] == pytest.approx((math.exp(cut) - cut - 1 + usual) / 2)
    loss.backward()
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([0.0, (1 - math.exp(-1.0)) / 2])
