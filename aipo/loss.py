"""The masked, clipped policy-gradient objective (eq. 2 and 3) and its importance correction.

A training step normalises once, by counts over all its micro-batches and ranks. So the stage is split:
:func:`loss_terms` gives the unnormalised sum and what it is to be divided by; :func:`policy_loss` divides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

AGGREGATIONS = ("sequence", "token", "constant", "all_tokens")


@dataclass
class LossTerms:
    """``total / denominator`` is the loss; sums over selected tokens for logging, to be divided by ``selected``."""

    total: Tensor  # () with gradient
    denominator: Tensor  # () sequences, tokens, or sequences * max_length
    sums: dict[str, Tensor]  # () each, no gradient


def loss_terms(
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
    ratio: str = "token",
    max_length: int | None = None,
    importance_weight: Tensor | None = None,
    lengths: Tensor | None = None,
) -> LossTerms:
    """Unnormalised eq. 2; arguments as in :func:`policy_loss`."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    if ratio != "token":
        raise ValueError(f"ratio must be token, got {ratio!r}")
    if kl_beta > 0 and logp_ref is None:
        raise ValueError("kl_beta > 0 needs logp_ref")
    if aggregation == "constant" and max_length is None:
        raise ValueError("aggregation='constant' needs max_length")
    mask = mask.bool()  # (B, T)
    # what is not selected must not reach the gradient even where it is inf or NaN: replace it before any arithmetic
    logp, logp_old = torch.where(mask, logp, 0.0), torch.where(mask, logp_old, 0.0)  # (B, T)
    if advantages.dim() == 1:
        advantages = advantages[:, None]  # (B, 1)
    advantages = torch.where(mask, advantages, 0.0)  # (B, T)

    rho = (logp - logp_old).clamp(max=80).exp()  # (B, T) eq. 3; an infinite one would be NaN where A is 0
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)  # (B, T)
    gain = torch.minimum(rho * advantages, clipped * advantages)  # (B, T)
    kl = torch.zeros_like(gain)  # (B, T)
    if logp_ref is not None:
        log_ratio = torch.where(mask, logp_ref, 0.0) - logp  # (B, T)
        kl = log_ratio.exp() - log_ratio - 1  # (B, T) k3
    token_loss = kl_beta * kl - gain if kl_beta > 0 else -gain  # (B, T)
    if importance_weight is not None:
        token_loss = token_loss * torch.where(mask, importance_weight.detach(), 0.0)
    token_loss = torch.where(mask, token_loss, 0.0)  # (B, T)

    selected = mask.sum(1)  # (B,)
    if aggregation == "sequence":  # a sequence that selects nothing drops out of the average
        total = (token_loss.sum(1) / selected.clamp(min=1)).sum()
        denominator = (selected > 0).sum()
    else:
        total = token_loss.sum()
        denominator = {
            "token": selected.sum(),
            "constant": selected.new_tensor(len(mask) * (max_length or 0)),
            "all_tokens": selected.new_tensor(mask.numel()) if lengths is None else lengths.sum(),
        }[aggregation]
    with torch.no_grad():
        clip = (rho * advantages > clipped * advantages) & mask  # (B, T)
        sums = {
            "selected": selected.sum(),
            "kl": (kl * mask).sum(),
            "clip_fraction": clip.sum(),
            "ratio": (rho * mask).sum(),
        }
    return LossTerms(total, denominator, sums)


def policy_loss(
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
    ratio: str = "token",
    max_length: int | None = None,
    importance_weight: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Minus eq. 2 of the paper: clipped policy gradient and k3 KL on the selected tokens only.

    Args:
        logp, logp_old, logp_ref: (B, T) log-probabilities in nats of the drawn tokens under the policy, the policy
            that drew them, and the initial model. Only values at selected positions are read.
        advantages: (B,) or (B, T).
        mask: (B, T) m_{i,t}; true where a token is trained on.
        kl_beta: weight of the KL; above 0 it needs ``logp_ref``.
        aggregation: ``sequence`` (eq. 2: mean over a sequence's selected tokens, then over the sequences that have
            any), ``token`` (sum over selected tokens / their number), ``constant`` (Dr. GRPO: sum / ``max_length``,
            mean over sequences), ``all_tokens`` (sum / number of completion tokens, from ``lengths`` (B,), or all of
            (B, T) without).
        importance_weight: (B, T) multiplied into the token loss, detached (:func:`importance_weights`).

    Returns:
        The loss, () with gradient, and metrics over selected tokens. With nothing selected both are 0.

    Raises:
        ValueError: an unknown rule, or an argument that a rule needs is missing.
    """
    terms = loss_terms(
        logp,
        logp_old,
        advantages,
        mask,
        logp_ref=logp_ref,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_beta=kl_beta,
        aggregation=aggregation,
        ratio=ratio,
        max_length=max_length,
        importance_weight=importance_weight,
        lengths=lengths,
    )
    selected = terms.sums["selected"].clamp(min=1)
    metrics = {k: float(v / selected) for k, v in terms.sums.items() if k != "selected"}
    metrics["selected"] = float(terms.sums["selected"])
    return terms.total / terms.denominator.clamp(min=1), metrics


def importance_weights(
    logp_old: Tensor, logp_engine: Tensor, mask: Tensor, *, rule: str, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights for tokens that the rollout engine drew with slightly other probabilities than ours.

    ``token_truncated``: min(exp(logp_old - logp_engine), cap) a token. ``sequence_mask``: 0 for every token of a
    sequence whose geometric mean of that ratio over its selected tokens lies outside [1/cap, cap], else 1.
    ``none``: 1.

    Args:
        logp_old, logp_engine: (B, T), read where ``mask`` (B, T) is true.

    Returns:
        (B, T) weights without gradient, and sums over selected tokens: ``weight``, ``kl`` (k3 estimate of the KL
        from the engine's distribution to ours, nats) and ``gap`` (absolute difference); ``weight_max`` is the
        largest ratio, before the cap.
    """
    difference = torch.where(mask, logp_old - logp_engine, 0.0).detach().float()  # (B, T)
    ratio = difference.exp()  # (B, T)
    if rule == "token_truncated":
        weight = ratio.clamp(max=cap)  # (B, T)
    elif rule == "sequence_mask":
        mean = difference.sum(1) / mask.sum(1).clamp(min=1)  # (B,)
        weight = (mean.abs() <= torch.tensor(cap).log()).float()[:, None].expand_as(ratio)  # (B, T)
    elif rule == "none":
        weight = torch.ones_like(ratio)  # (B, T)
    else:
        raise ValueError(f"unknown importance correction {rule!r}")
    return weight, {
        "weight": (weight * mask).sum(),
        "weight_max": (ratio * mask).max() if mask.any() else ratio.new_zeros(()),
        "kl": ((ratio - difference - 1) * mask).sum(),
        "gap": (difference.abs() * mask).sum(),
    }
