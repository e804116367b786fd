"""The objective against plain Python loops written from eq. 2 and 3, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aipo.loss import AGGREGATIONS, importance_weights, loss_terms, policy_loss

INF, NAN = math.inf, math.nan


def eq2(
    logp: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    logp_ref: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl_beta: float = 0.0,
    aggregation: str = "sequence",
    max_length: int | None = None,
    importance_weight: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """-J of eq. 2, one token after the other; only ``logp`` stays a tensor, so that it has a gradient."""
    rows, tokens, selected_tokens = [], logp.new_zeros(()), 0
    for i in range(len(logp)):
        row, selected = logp.new_zeros(()), 0
        for t in range(logp.shape[1]):
            if not mask[i, t]:
                continue
            advantage = float(advantages[i] if advantages.dim() == 1 else advantages[i, t])
            ratio = torch.exp(logp[i, t] - float(logp_old[i, t]))
            clipped = 1 - clip_low if ratio < 1 - clip_low else 1 + clip_high if ratio > 1 + clip_high else ratio
            surrogate, bounded = ratio * advantage, clipped * advantage
            token = surrogate if surrogate <= bounded else bounded
            if kl_beta and logp_ref is not None:
                ref_over_policy = torch.exp(float(logp_ref[i, t]) - logp[i, t])
                token = token - kl_beta * (ref_over_policy - torch.log(ref_over_policy) - 1)
            if importance_weight is not None:
                token = token * float(importance_weight[i, t])
            row, selected = row + token, selected + 1
        if selected:
            rows.append(row / selected)
        tokens, selected_tokens = tokens + row, selected_tokens + selected
    if aggregation == "sequence":
        return -torch.stack(rows).mean() if rows else tokens
    if aggregation == "token":
        return -tokens / max(selected_tokens, 1)
    if aggregation == "constant":
        assert max_length is not None
        return -tokens / (len(logp) * max_length)
    return -tokens / (mask.numel() if lengths is None else max(int(lengths.sum()), 1))


def batch(seed: int, rows: int = 4, width: int = 7, spread: float = 0.4) -> dict[str, Tensor]:
    """Ragged rows; the ratios fall on both sides of both clipping bounds."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    lengths = torch.randint(0, width + 1, (rows,), generator=random)
    logp_old = -normal(rows, width).abs()
    inside = torch.arange(width) < lengths[:, None]
    return {
        "logp": logp_old + spread * normal(rows, width),
        "logp_old": logp_old,
        "logp_ref": logp_old + 0.5 * normal(rows, width),
        "advantages": normal(rows),
        "mask": inside & (torch.rand(rows, width, generator=random) < 0.6),
        "importance_weight": normal(rows, width).abs(),
        "lengths": lengths,
    }


def value_and_gradient(function: Any, logp: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    logp = logp.clone().requires_grad_()
    result = function(logp, *args, **options)
    loss = result[0] if isinstance(result, tuple) else result
    return loss.detach(), torch.autograd.grad(loss, logp, allow_unused=True, materialize_grads=True)[0]


def compare(b: dict[str, Tensor], **options: Any) -> None:
    args = (b["logp"], b["logp_old"], b["advantages"], b["mask"])
    loss, gradient = value_and_gradient(policy_loss, *args, **options)
    expected, expected_gradient = value_and_gradient(lambda *a, **o: eq2(*a, **o) + 0 * a[0].sum(), *args, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)
    assert (gradient[~b["mask"]] == 0).all()


# --- eq. 2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kl_beta", [0.0, 0.04])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("per_token", [False, True], ids=["A per row", "A per token"])
def test_value_and_gradient(aggregation: str, kl_beta: float, weighted: bool, per_token: bool) -> None:
    for seed in range(5):
        b = batch(seed)
        if per_token:
            b["advantages"] = b["advantages"][:, None] + 0.5 * b["logp_ref"]
        compare(
            b,
            aggregation=aggregation,
            kl_beta=kl_beta,
            logp_ref=b["logp_ref"],
            max_length=9,
            lengths=b["lengths"],
            importance_weight=b["importance_weight"] if weighted else None,
            clip_low=0.1,
            clip_high=0.4,
        )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.3, 3.0]),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from([0.0, 0.1]),
)
def test_value_and_gradient_of_any_shape(
    seed: int, rows: int, width: int, spread: float, aggregation: str, kl_beta: float
) -> None:
    b = batch(seed, rows, width, spread)
    if spread == 0:  # strictly on-policy: both branches of the minimum tie, their gradient is that of the ratio
        b["logp"] = b["logp_old"].clone()
    compare(b, aggregation=aggregation, kl_beta=kl_beta, logp_ref=b["logp_ref"], max_length=width)


def test_by_hand() -> None:
    # ratios 1.5, 0.5 / 1.5, 0.5; A = 1 / -2; eps 0.2, 0.28: gains 1.28, 0.5 / -3, -1.6
    ratios = torch.tensor([[1.5, 0.5], [1.5, 0.5]], dtype=torch.float64)
    mask = torch.ones(2, 2, dtype=torch.bool)
    args = (ratios.log(), torch.zeros_like(ratios), torch.tensor([1.0, -2.0]), mask)
    loss, metrics = policy_loss(*args)
    assert loss.item() == pytest.approx(-((1.28 + 0.5) / 2 + (-3 - 1.6) / 2) / 2)
    assert metrics["clip_fraction"] == pytest.approx(2 / 4)  # 1.5 of A > 0 and 0.5 of A < 0
    assert metrics["ratio"] == pytest.approx(1.0)
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


# --- what must not count ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("garbage", [INF, -INF, NAN, 1e30])
def test_values_outside_the_mask_are_never_read(aggregation: str, garbage: float) -> None:
    b = batch(3)
    b["advantages"] = b["advantages"][:, None].expand_as(b["logp"])
    options: dict[str, Any] = {"aggregation": aggregation, "kl_beta": 0.1, "max_length": 7}
    dirty = {k: torch.where(b["mask"], v, garbage) for k, v in b.items() if k not in ("mask", "lengths")}
    outcomes = []
    for values in (b, dirty):
        logp = values["logp"].clone().requires_grad_()
        loss, metrics = policy_loss(
            logp,
            values["logp_old"],
            values["advantages"],
            b["mask"],
            logp_ref=values["logp_ref"],
            importance_weight=values["importance_weight"],
            **options,
        )
        outcomes.append((loss, torch.autograd.grad(loss, logp)[0], metrics))
    (loss, gradient, metrics), (dirty_loss, dirty_gradient, dirty_metrics) = outcomes
    assert torch.equal(loss, dirty_loss)
    assert torch.equal(gradient, dirty_gradient)
    assert metrics == dirty_metrics
    assert (dirty_gradient[~b["mask"]] == 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_empty_mask_is_zero(aggregation: str) -> None:
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
        max_length=7,
        lengths=torch.zeros(4, dtype=torch.long),
    )
    loss.backward()
    assert loss.item() == 0
    assert logp.grad is not None
    assert (logp.grad == 0).all()
    assert set(metrics.values()) == {0.0}


def test_a_sequence_that_selects_nothing_drops_out() -> None:
    b = batch(2, rows=3)
    b["mask"] = torch.tensor([[True] * 7, [False] * 7, [True] * 7])
    args = [b[k] for k in ("logp", "logp_old", "advantages", "mask")]
    torch.testing.assert_close(policy_loss(*args)[0], policy_loss(*[a[[0, 2]] for a in args])[0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("gap", [0.5, 200.0], ids=["usual ratio", "ratio beyond float32"])
def test_constant_groups_are_zero(aggregation: str, gap: float) -> None:
    logp = torch.full((2, 3), -0.5, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    loss, metrics = policy_loss(logp, logp.detach() - gap, torch.zeros(2), mask, aggregation=aggregation, max_length=3)
    loss.backward()
    assert loss.item() == 0
    assert logp.grad is not None
    assert (logp.grad == 0).all()
    assert all(math.isfinite(v) for v in metrics.values())


# --- one denominator ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 3), min_size=1, max_size=4), st.sampled_from(AGGREGATIONS))
def test_micro_batches_add_up(seed: int, parts: list[int], aggregation: str) -> None:
    b = batch(seed, rows=sum(parts))
    names = ("logp", "logp_old", "advantages", "mask")
    options: dict[str, Any] = {"kl_beta": 0.1, "aggregation": aggregation, "max_length": 7}
    named = ("logp_ref", "importance_weight", "lengths")
    options |= {k: b[k] for k in named}
    whole, gradient = value_and_gradient(policy_loss, *[b[k] for k in names], **options)

    logp = b["logp"].clone().requires_grad_()
    pieces = [{k: v.split(parts)[i] for k, v in {**b, "logp": logp}.items()} for i in range(len(parts))]
    terms = [loss_terms(*[p[k] for k in names], **{**options, **{k: p[k] for k in named}}) for p in pieces]
    denominator = torch.stack([t.denominator for t in terms]).sum().clamp(min=1)
    loss = torch.stack([t.total for t in terms]).sum() / denominator
    torch.testing.assert_close(loss.detach(), whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], gradient, rtol=1e-9, atol=1e-12)
    assert sum(int(t.sums["selected"]) for t in terms) == int(b["mask"].sum())


def test_bad_arguments() -> None:
    args = (torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1, dtype=torch.bool))
    bad: list[dict[str, Any]] = [
        {"aggregation": "mean"},
        {"ratio": "word"},
        {"kl_beta": 0.1},
        {"aggregation": "constant"},
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
    assert sums["weight"].item() == pytest.approx(7.5)
    assert sums["weight_max"].item() == pytest.approx(3)
    k3 = [r - math.log(r) - 1 for r in (3, 0.5, 3, 3, 1)]
    assert sums["kl"].item() == pytest.approx(sum(k3), rel=1e-5)
    assert sums["gap"].item() == pytest.approx(3 * math.log(3) + math.log(2), rel=1e-5)


def test_sequence_mask_by_hand() -> None:
    # geometric means: sqrt(1.5) = 1.22, 3, 1
    weight, sums = importance_weights(OURS, ENGINE, SELECTED, rule="sequence_mask", cap=2.0)
    assert weight[SELECTED].tolist() == [1, 1, 0, 0, 1]
    assert sums["weight"].item() == 3
    lower, _ = importance_weights(ENGINE, OURS, SELECTED, rule="sequence_mask", cap=2.0)  # 1/3 is below 1/2
    assert lower[SELECTED].tolist() == [1, 1, 0, 0, 1]


def test_no_correction_is_one_but_measured() -> None:
    weight, sums = importance_weights(OURS, ENGINE, SELECTED, rule="none", cap=2.0)
    assert (weight == 1).all()
    assert sums["weight_max"].item() == pytest.approx(3)
    with pytest.raises(ValueError, match="sometimes"):
        importance_weights(OURS, ENGINE, SELECTED, rule="sometimes", cap=2.0)


@pytest.mark.parametrize("rule", ["none", "token_truncated", "sequence_mask"])
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
