"""Losses and advantages as slow loops, one token after the other, written from the formulas and from nothing else.

Python floats stand for what carries no gradient; only log-probabilities and entropies of the policy stay tensors.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

# --- loss ---------------------------------------------------------------------------------------------------------


def objective(
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
) -> Tensor:
    """-J: eq. 2 of AIPO, and what GSPO, CISPO, SAPO, DPPO, NAT, prioritised KL and IIB-LPO change in it."""
    zero = torch.zeros((), dtype=logp.dtype)
    sequences, tokens, selected_tokens = [], zero, 0
    for i in range(len(logp)):
        selected = [t for t in range(logp.shape[1]) if mask[i, t]]
        row = zero
        for t in selected:
            advantage = (advantages[i] if advantages.dim() == 1 else advantages[i, t]).item()
            if ratio == "sequence":
                exponent = zero
                for u in selected:
                    exponent = exponent + (logp[i, u] - logp_old[i, u].item()) / len(selected)
                rho = torch.exp(exponent)
            else:
                rho = torch.exp(logp[i, t] - logp_old[i, t].item())
            low, high = rho.new_tensor(1 - clip_low), rho.new_tensor(1 + clip_high)
            clipped = low if rho < low else high if rho > high else rho
            if ratio == "clipped_weight":
                gain = clipped.item() * advantage * logp[i, t]
            elif ratio == "soft_gate":
                tau = gate_positive if advantage > 0 else gate_negative
                gain = 4 / tau / (1 + torch.exp(-tau * (rho - 1))) * advantage
            elif ratio in ("tv_mask", "kl_mask"):
                distance = total_variation if ratio == "tv_mask" else bernoulli_kl
                far = distance(math.exp(logp_old[i, t].item()), math.exp(logp[i, t].item())) > divergence
                away = (advantage > 0 and rho > 1) or (advantage < 0 and rho < 1)
                gain = zero if far and away else rho * advantage
            else:
                gain = rho * advantage if rho * advantage <= clipped * advantage else clipped * advantage
            if kl_beta:
                assert logp_ref is not None
                ref_over_policy = torch.exp(logp_ref[i, t].item() - logp[i, t])
                k3 = ref_over_policy - torch.log(ref_over_policy) - 1
                gain = gain - kl_beta * (1 if kl_weight is None else kl_weight[i, t].item()) * k3
            if entropy_weight:
                assert entropy is not None
                gain = gain + entropy_weight * advantage * entropy[i, t]
            if importance_weight is not None:
                gain = gain * importance_weight[i, t].item()
            row = row + (gain if inclusion is None else gain / inclusion[i, t].item())
        counted = len(selected)
        if inclusion is not None:  # as if all tokens were trained on
            assert lengths is not None
            counted = int(lengths[i])
        if counted:
            sequences.append(row / counted)
        tokens, selected_tokens = tokens + row, selected_tokens + counted
    if aggregation == "sequence":
        return -torch.stack(sequences).mean() if sequences else zero
    if aggregation == "token":
        return -tokens / max(selected_tokens, 1)
    if aggregation == "constant":
        assert max_length is not None
        return -tokens / (len(logp) * max_length)
    assert aggregation == "all_tokens"
    return -tokens / (mask.numel() if lengths is None else max(int(lengths.sum()), 1))


def total_variation(p: float, q: float) -> float:
    """Of two coins: half the sum of the absolute differences."""
    return (abs(p - q) + abs((1 - p) - (1 - q))) / 2


def bernoulli_kl(p: float, q: float) -> float:
    return sum(a * (math.log(a) - math.log(b)) if b else math.inf for a, b in ((p, q), (1 - p, 1 - q)) if a)


def icepop_weights(logp_train: Sequence[float], logp_infer: Sequence[float], alpha: float, beta: float) -> list[float]:
    """M(k) = k where alpha <= k <= beta, else 0; k = pi_train / pi_infer."""
    ratios = [math.exp(train) / math.exp(infer) for train, infer in zip(logp_train, logp_infer)]
    return [k if alpha <= k <= beta else 0.0 for k in ratios]


def kl_priority(entropy: Sequence[float], vocab_size: int, power: float) -> list[float]:
    return [min(1.0, max(0.0, 1 - h / math.log(vocab_size))) ** power for h in entropy]


# --- advantage: one rollout at a time, lists of its tokens ---------------------------------------------------------


def group_advantages(rewards: Sequence[float], size: int, baseline: str, normalize: str) -> list[float]:
    out = []
    for i, reward in enumerate(rewards):
        first = i // size * size
        group = list(rewards if baseline == "batch" else rewards[first : first + size])
        others = group.copy()
        others.remove(reward)
        mean = statistics.mean((others or group) if baseline == "leave_one_out" else group)
        if normalize == "mean":  # MaxRL
            whole = statistics.mean(group)
            out.append((reward - mean) / whole if whole > 0 else 0.0)
            continue
        deviation = statistics.stdev(group) if len(group) > 1 else 0.0
        out.append((reward - mean) / (deviation + 1e-6 if normalize == "std" else 1))
    return out


def zscore(values: Sequence[float]) -> list[float]:
    """Not finite means not measured; no variation (up to rounding) means 0."""
    measured = [v for v in values if math.isfinite(v)]
    if not measured:
        return [0.0] * len(values)
    mean, deviation = statistics.fmean(measured), statistics.pstdev(measured)
    if deviation <= 1e-6 * abs(mean):
        return [0.0] * len(values)
    return [(v - mean) / deviation if math.isfinite(v) else 0.0 for v in values]


def blend(advantage: float, scores: Sequence[float], how: str, weight: float) -> list[float]:
    return [advantage + weight * z if how == "additive" else advantage * (1 + weight * z) for z in zscore(scores)]


def information_advantages(
    advantage: float,
    information: Sequence[float],
    confidence: Sequence[float],
    correct: bool,
    alpha: float,
    beta: float,
    norm: str = "zscore",
) -> list[float]:
    scaled = zscore if norm == "zscore" else unit_norm
    signed = [c if correct else -c for c in confidence]
    return [advantage + alpha * s + beta * c for s, c in zip(scaled(information), scaled(signed))]


def unit_norm(values: Sequence[float]) -> list[float]:
    """IAPO's published code: x - mean / std, then divided by the length of the vector."""
    measured = [v for v in values if math.isfinite(v)]
    if len(measured) < 2 or statistics.stdev(measured) <= 1e-6 * abs(statistics.fmean(measured)):
        return [0.0] * len(values)
    shift = statistics.fmean(measured) / statistics.stdev(measured)
    length = math.sqrt(sum((v - shift) ** 2 for v in measured))
    return [(v - shift) / length if math.isfinite(v) else 0.0 for v in values]


def reallocate_by_entropy(
    advantage: float, entropy: Sequence[float], mean: float, std: float, alpha: float, phi: float
) -> list[float]:
    out = []
    for h in entropy:
        bound = abs(advantage) / phi
        capacity = min(bound, max(-bound, (h - mean) / std))
        sign = 1 if advantage > 0 else -1 if advantage < 0 else 0
        out.append(advantage + alpha * sign * capacity)
    return out


def entropy_quadrants(advantage: float, entropy: Sequence[float], threshold: float) -> list[int]:
    if advantage == 0:
        return [-1] * len(entropy)
    return [(0 if h > threshold else 1) + (0 if advantage > 0 else 2) for h in entropy]


def weight_tokens(advantage: float, weights: Sequence[float]) -> list[float]:
    if sum(weights) == 0:
        return [advantage] * len(weights)
    return [advantage * w * len(weights) / sum(weights) for w in weights]


def token_baselines(rewards: Sequence[float], energies: Sequence[Sequence[float]]) -> list[list[float]]:
    """R_i - B_t of each rollout of one group, B_t = sum R W_t / sum W_t over those of at least t tokens (OTB)."""
    out: list[list[float]] = [[] for _ in rewards]
    for t in range(max(map(len, energies))):
        there = [i for i, energy in enumerate(energies) if len(energy) > t]
        gathered = {i: sum(energies[i][: t + 1]) for i in there}
        if not any(gathered.values()):
            gathered = dict.fromkeys(there, 1.0)
        baseline = sum(rewards[i] * gathered[i] for i in there) / sum(gathered.values())
        for i in there:
            out[i].append(rewards[i] - baseline)
    return out


def gini(weights: Sequence[float]) -> float:
    """Mean absolute difference of all pairs over twice the mean."""
    if sum(weights) == 0:
        return 0.0
    differences = sum(abs(v - w) for v in weights for w in weights)
    return differences / (2 * len(weights) * sum(weights))


def effective_token_ratio(weights: Sequence[float]) -> float:
    if sum(weights) == 0:
        return 1.0
    return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
