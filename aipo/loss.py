"""The masked, clipped policy-gradient objective (eq. 2 and 3), its variants, and its importance correction.

A training step normalises once, by counts over all its micro-batches and ranks. So the stage is split:
:func:`loss_terms` gives the unnormalised sum and what it is to be divided by; :func:`policy_loss` divides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aipo.config.sections import LossConfig

AGGREGATIONS = ("sequence", "token", "constant", "all_tokens")
MAX_LOG_RATIO = 20.0
"""nats; of k3's log ratio, which grows exponentially: one token that the initial model finds e^20 times as likely
would outweigh all others of a batch. Drift in training stays far below; beyond it the KL has no gradient."""
RATIOS = ("token", "sequence", "clipped_weight", "soft_gate", "tv_mask", "kl_mask")


@dataclass(frozen=True, eq=False)
class LossInputs:
    """What the loss of some rollouts is made of; values are read at selected positions only."""

    logp: Tensor  # (B, T) nats, of the drawn tokens under the policy, with gradient
    logp_old: Tensor  # (B, T) under the policy before the first update on these rollouts
    advantages: Tensor  # (B,) or (B, T)
    mask: Tensor  # (B, T) m_{i,t}: true where a token is trained on
    logp_ref: Tensor | None = None  # (B, T) under the initial model
    logp_engine: Tensor | None = None  # (B, T) as the rollout engine drew them; None where nothing is to be corrected
    importance_weight: Tensor | None = None  # (B, T) given instead
    inclusion: Tensor | None = None  # (B, T) in (0, 1], the chance with which the mask drew a token; needs lengths
    lengths: Tensor | None = None  # (B,) completion tokens, but for those that an earlier branch has already
    kl_weight: Tensor | None = None  # (B, T)
    entropy: Tensor | None = None  # (B, T) nats, with gradient


@dataclass
class LossTerms:
    """``total / denominator`` is the loss; sums over selected tokens for logging, to be divided by ``selected``."""

    total: Tensor  # () with gradient
    denominator: Tensor  # () sequences, tokens, or sequences * max_length
    sums: dict[str, Tensor]  # () each, no gradient


def loss_terms(
    inputs: LossInputs,
    config: LossConfig,
    *,
    max_length: int | None = None,
    correction: tuple[str, float, float] = ("none", 2.0, 0.5),
) -> LossTerms:
    """Unnormalised eq. 2 with the rules of a config's section ``loss``; see :func:`policy_loss`.

    Args:
        max_length: of a completion, for the aggregation ``constant``.
        correction: rule, cap and floor of :func:`importance_weights`, where ``logp_engine`` is there; its sums are
            among the terms' as ``mismatch_*``, its largest ratio as ``weight_max``.
    """
    clip_low, clip_high, aggregation = config.clip_low, config.clip_high, config.aggregation
    kl_beta = config.kl_beta if config.kl_in == "loss" else 0.0
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    if config.ratio not in RATIOS:
        raise ValueError(f"ratio must be one of {', '.join(RATIOS)}, got {config.ratio!r}")
    if kl_beta > 0 and inputs.logp_ref is None:
        raise ValueError("kl_beta > 0 needs logp_ref")
    if config.entropy_weight != 0 and inputs.entropy is None:
        raise ValueError("entropy_weight needs entropy")
    if aggregation == "constant" and max_length is None:
        raise ValueError("aggregation='constant' needs max_length")
    if config.old_policy == "engine" and inputs.logp_engine is None:
        raise ValueError("old_policy='engine' needs logp_engine")
    if inputs.inclusion is not None and inputs.lengths is None:
        raise ValueError("inclusion needs lengths")
    logp, logp_old, advantages, mask = inputs.logp, inputs.logp_old, inputs.advantages, inputs.mask
    weight: Tensor | None = inputs.importance_weight
    mismatch: dict[str, Tensor] = {}
    if inputs.logp_engine is not None:
        rule, cap, floor = correction
        weight, mismatch = importance_weights(logp_old, inputs.logp_engine, mask, rule=rule, cap=cap, floor=floor)
        if config.old_policy == "engine":  # the ratio then has the difference in it
            logp_old = inputs.logp_engine  # (B, T)
    mask = mask.bool()  # (B, T)
    selected = counted = mask.sum(1)  # (B,)
    # what is not selected must not reach the gradient even where it is inf or NaN: replace it before any arithmetic
    logp, logp_old = torch.where(mask, logp, 0.0), torch.where(mask, logp_old, 0.0)  # (B, T)
    if advantages.dim() == 1:
        advantages = advantages[:, None]  # (B, 1)
    advantages = torch.where(mask, advantages, 0.0)  # (B, T)

    log_rho = logp - logp_old  # (B, T)
    if config.ratio == "sequence":  # one ratio, so one clip, for all selected tokens of a sequence
        log_rho = (log_rho.sum(1) / selected.clamp(min=1))[:, None].expand_as(logp)
    rho = log_rho.clamp(max=80).exp()  # (B, T) eq. 3; an infinite one would be NaN where A is 0
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)  # (B, T)
    if config.ratio == "clipped_weight":
        gain = clipped.detach() * advantages * logp  # (B, T)
        clip = (rho != clipped) & mask  # (B, T)
    elif config.ratio == "soft_gate":
        tau = torch.full_like(rho, config.gate_negative).masked_fill(advantages > 0, config.gate_positive)  # (B, T)
        gain = (tau * (rho - 1)).sigmoid() * (4 / tau) * advantages  # (B, T)
        clip = torch.zeros_like(mask)  # (B, T)
    elif config.ratio in ("tv_mask", "kl_mask"):
        far = binary_divergence(logp_old, logp.detach(), kl=config.ratio == "kl_mask") > config.divergence  # (B, T)
        clip = far & (log_rho * advantages > 0) & mask  # (B, T) what would drive the policy further away
        gain = torch.where(clip, 0.0, rho * advantages)  # (B, T)
    else:
        gain = torch.minimum(rho * advantages, clipped * advantages)  # (B, T)
        clip = (rho * advantages > clipped * advantages) & mask  # (B, T)
    kl = torch.zeros_like(gain)  # (B, T)
    if inputs.logp_ref is not None:
        kl = k3(logp, torch.where(mask, inputs.logp_ref, 0.0))  # (B, T)
    penalty = kl if inputs.kl_weight is None else kl * torch.where(mask, inputs.kl_weight.detach(), 0.0)  # (B, T)
    token_loss = kl_beta * penalty - gain if kl_beta > 0 else -gain  # (B, T)
    if inputs.entropy is not None and config.entropy_weight != 0:
        token_loss = token_loss - config.entropy_weight * advantages * torch.where(mask, inputs.entropy, 0.0)
    if weight is not None:
        token_loss = token_loss * torch.where(mask, weight.detach(), 0.0)
    token_loss = torch.where(mask, token_loss, 0.0)  # (B, T)
    if inputs.inclusion is not None and inputs.lengths is not None:  # estimate what all tokens give
        token_loss = token_loss / torch.where(mask, inputs.inclusion, 1.0)
        counted = inputs.lengths.to(selected)  # (B,)

    if aggregation == "sequence":  # a sequence that selects nothing drops out of the average
        total = (token_loss.sum(1) / counted.clamp(min=1)).sum()
        denominator = (counted > 0).sum()
    else:
        total = token_loss.sum()
        denominator = {
            "token": counted.sum(),
            "constant": selected.new_tensor(len(mask) * (max_length or 0)),
            "all_tokens": selected.new_tensor(mask.numel()) if inputs.lengths is None else inputs.lengths.sum(),
        }[aggregation]
    with torch.no_grad():
        sums = {
            "selected": selected.sum(),
            "clip_fraction": clip.sum(),
            **({} if inputs.logp_ref is None else {"kl": (kl * mask).sum()}),  # not measured is not zero
            **mismatch,
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
    kl_weight: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_weight: float = 0.0,
    inclusion: Tensor | None = None,
    gate_positive: float = 1.0,
    gate_negative: float = 1.05,
    divergence: float = 0.15,
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
        ratio: ``token`` (eq. 3: pi / pi_old of each token, in the clipped minimum of eq. 2); ``sequence`` (GSPO,
            arXiv 2507.18071: the geometric mean of those over a sequence's selected tokens stands for all of them);
            ``clipped_weight`` (CISPO, arXiv 2506.13585: A log pi, weighted by the detached, clipped token ratio;
            ``clip_low`` of 1 or more leaves it unbounded below); ``soft_gate`` (SAPO, arXiv 2511.20347: A times
            sigmoid(tau (rho - 1)) 4 / tau, whose slope at 1 is 1, with ``gate_positive`` for tau where A > 0, else
            ``gate_negative``); ``tv_mask`` and ``kl_mask`` (DPPO, arXiv 2602.04879, eq. 11 and 12: rho A, but 0 for a
            token that would go on away from the old policy once its :func:`binary_divergence` exceeds
            ``divergence``). The gradient of ``sequence`` runs through the mean and is the same for all tokens of a
            sequence: advantages (B, T) cannot tell them apart there.
        importance_weight: (B, T) multiplied into the token loss, detached (:func:`importance_weights`).
        kl_weight: (B, T) multiplied into the KL of each token, detached (:func:`kl_priority`).
        entropy: (B, T) entropy of the policy in nats, with gradient. The loss gains -``entropy_weight`` A_t H_t a
            token, the self-reward of IIB-LPO (arXiv 2601.05870; 0.005 there).
        inclusion: (B, T) chance with which the mask selects a token. Each selected token's loss is divided by it, and
            ``sequence`` and ``token`` count all ``lengths`` tokens instead of the selected ones: the expectation over
            masks is then the loss of all tokens (Horvitz-Thompson; NAT, arXiv 2603.06619), unless ``ratio`` is
            ``sequence``, which is not a sum over tokens.

    Returns:
        The loss, () with gradient, and metrics over selected tokens: ``kl`` (unweighted), ``clip_fraction``
        (of tokens where the bound decides) and the count ``selected``. With nothing selected all are 0.

    Raises:
        ValueError: an unknown rule, or an argument that a rule needs is missing.
    """
    inputs = LossInputs(
        logp,
        logp_old,
        advantages,
        mask,
        logp_ref=logp_ref,
        importance_weight=importance_weight,
        lengths=lengths,
        kl_weight=kl_weight,
        entropy=entropy,
        inclusion=inclusion,
    )
    config = LossConfig.model_construct(  # without a config's bounds, as here any clip is defined
        clip_low=clip_low,
        clip_high=clip_high,
        kl_beta=kl_beta,
        aggregation=aggregation,
        ratio=ratio,
        entropy_weight=entropy_weight,
        gate_positive=gate_positive,
        gate_negative=gate_negative,
        divergence=divergence,
    )
    terms = loss_terms(inputs, config, max_length=max_length)
    selected = terms.sums["selected"].clamp(min=1)
    metrics = {name: float(terms.sums.get(name, 0.0) / selected) for name in ("kl", "clip_fraction")}
    metrics["selected"] = float(terms.sums["selected"])
    return terms.total / terms.denominator.clamp(min=1), metrics


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """k3 estimate of the KL from the reference at tokens drawn from the policy, nats: r - log r - 1. (B, T)"""
    log_ratio = (logp_ref - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # (B, T)
    return log_ratio.exp() - log_ratio - 1


def kl_priority(unsure: Tensor, vocab_size: int, power: float) -> Tensor:
    """KL weight J^power, J = 1 - U / log V: the less certain the initial model is of a token, the freer it is to move.

    Prioritised KL on critical tokens (Vassoyan et al. 2025, arXiv 2502.06533), of which the initial model is unsure.

    Args:
        unsure: (B, T) U of the initial model, in nats, 0..log V: its entropy (the paper), or minus the log of its
            largest probability (the authors' code).
        vocab_size: V, at least 2.

    Returns:
        (B, T) in [0, 1], without gradient.
    """
    if vocab_size < 2 or power < 0:
        raise ValueError(f"needs vocab_size >= 2 and power >= 0, got {vocab_size} and {power}")
    return (1 - unsure.detach() / math.log(vocab_size)).clamp(0, 1).pow(power)


def binary_divergence(logp_old: Tensor, logp: Tensor, *, kl: bool) -> Tensor:
    """How far two policies are apart on "this token, or another" (DPPO's binary approximation, eq. 13 and 14).

    Args:
        logp_old, logp: (B, T) log-probabilities in nats of the drawn tokens; p_old = exp(logp_old), p = exp(logp).
        kl: KL(p_old, p) of the two Bernoulli distributions in nats, infinite where p is 1 and p_old is not; else
            their total variation |p - p_old|. Both lie below those of the whole vocabulary.

    Returns:
        (B, T)
    """
    old, new = logp_old.exp(), logp.exp()  # (B, T)
    if not kl:
        return (new - old).abs()
    other_old, other_new = (-each.expm1().clamp(max=0) for each in (logp_old, logp))  # (B, T) 1 - p, exact near p = 1
    rest = torch.xlogy(other_old, other_old) - torch.xlogy(other_old, other_new)  # (B, T)
    return old * (logp_old - logp) + rest


def importance_weights(
    logp_old: Tensor, logp_engine: Tensor, mask: Tensor, *, rule: str, cap: float, floor: float = 0.5
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights for tokens that the rollout engine drew with slightly other probabilities than ours.

    ``token_truncated``: min(exp(logp_old - logp_engine), cap) a token. ``token_mask``: that ratio itself inside
    [floor, cap], 0 outside (IcePop, arXiv 2510.18855). ``sequence_mask``: 0 for every token of a sequence whose
    geometric mean of that ratio over its selected tokens lies outside [1/cap, cap], else 1. ``none``: 1.

    Args:
        logp_old, logp_engine: (B, T), read where ``mask`` (B, T) is true.

    Returns:
        (B, T) weights without gradient, and sums over selected tokens: ``mismatch_weight``, ``mismatch_kl`` (k3
        estimate of the KL from the engine's distribution to ours, nats) and ``mismatch_gap`` (absolute difference),
        of the masks also ``mismatch_dropped`` (tokens of weight 0); ``weight_max`` is the largest ratio, before the
        cap.
    """
    difference = torch.where(mask, logp_old - logp_engine, 0.0).detach().float()  # (B, T)
    ratio = difference.exp()  # (B, T)
    if rule == "token_truncated":
        weight = ratio.clamp(max=cap)  # (B, T)
    elif rule == "token_mask":
        weight = torch.where((ratio >= floor) & (ratio <= cap), ratio, 0.0)  # (B, T)
    elif rule == "sequence_mask":
        mean = difference.sum(1) / mask.sum(1).clamp(min=1)  # (B,)
        weight = (mean.abs() <= torch.tensor(cap).log()).float()[:, None].expand_as(ratio)  # (B, T)
    elif rule == "none":
        weight = torch.ones_like(ratio)  # (B, T)
    else:
        raise ValueError(f"unknown importance correction {rule!r}")
    return weight, {
        "mismatch_weight": (weight * mask).sum(),
        "mismatch_kl": ((ratio - difference - 1) * mask).sum(),
        "mismatch_gap": (difference.abs() * mask).sum(),
        **({"mismatch_dropped": ((weight == 0) & mask).sum()} if rule.endswith("_mask") else {}),
        "weight_max": (ratio * mask).max() if mask.any() else ratio.new_zeros(()),
    }
