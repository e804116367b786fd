"""Advantages of rollouts from their rewards (eq. 4), and the rules that give each token its own.

What a rule returns behind a row's length is finite and means nothing; what it was given there is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aipo import distributed
from aipo.config.sections import AdvantageConfig
from aipo.layout import token_grid
from aipo.mask import NOISE
from aipo.rollouts import Rollouts

QUADRANTS = ("positive_high", "positive_low", "negative_high", "negative_low")
"""{sign of the advantage} x {entropy high, low}, numbered as :func:`entropy_quadrants` returns them"""


def group_advantages(rewards: Tensor, group_size: int, *, baseline: str = "group", normalize: str = "none") -> Tensor:
    """A = R - baseline (eq. 4), optionally divided by the standard deviation (GRPO) or the mean (MaxRL).

    Args:
        rewards: (B,), rollouts of one question adjacent; NaN, no verdict, counts neither in means nor in numbers.
        group_size: rollouts a question; must divide B.
        baseline: ``group`` mean, ``batch`` mean, or ``leave_one_out`` (mean of the group's others).
        normalize: ``none``, or ``std``: divide by sample standard deviation + 1e-6, over the group (over the batch
            with ``baseline="batch"``). Fewer than two samples have none: their advantage is 0. ``mean``: divide by
            the mean reward of the same, and 0 where it is not positive (MaxRL, arXiv 2602.02710). With rewards 0 and 1
            of n rollouts, the gradient is then in expectation that of sum_{k<n} pass@k / k, a series whose limit is
            the logarithm of the chance of a right answer.

    Returns:
        (B,) float32; exactly 0 in a group whose rewards are all equal (unless the baseline is the batch's), and for
        NaN.
    """
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {len(rewards)} rewards")
    if baseline not in ("group", "batch", "leave_one_out") or normalize not in ("none", "std", "mean"):
        raise ValueError(f"unknown baseline {baseline!r} or normalize {normalize!r}")
    if not len(rewards):  # a rank that dynamic sampling left nothing
        return rewards.float()
    groups = rewards.float().reshape((1, -1) if baseline == "batch" else (-1, group_size))  # (Q, n)
    judged = groups.isfinite()  # (Q, n)
    n = judged.sum(1, keepdim=True)  # (Q, 1)
    mean = groups.nanmean(1, keepdim=True)  # (Q, 1)
    centred = (groups - mean).where(judged, 0.0)  # (Q, n)
    centred = centred.masked_fill(constant_groups(groups)[:, None], 0.0)  # no rounding residue; a lone one is constant
    others = (n - 1).clamp(min=1)  # (Q, 1)
    std = (centred.square().sum(1, keepdim=True) / others).sqrt()  # (Q, 1)
    if baseline == "leave_one_out":
        centred = centred * (n / others)  # R_i - mean of the others
    if normalize == "std":
        centred = centred / (std + 1e-6)
    if normalize == "mean":
        centred = torch.where(mean > 0, centred / mean, 0.0)
    return centred.reshape(-1)


def assign(rollouts: Rollouts, config: AdvantageConfig, *, truncated: str = "train") -> None:
    """Advantages (B,) from the rewards of judged rollouts, and which of them take part in the update (B,).

    Without a verdict none does; with ``truncated="mask"`` (``loss.truncated``) none that the length limit cut, though
    its reward counts in its group's mean. A collective with the baseline ``batch``, which is the mean over all ranks.
    """
    rewards, n = rollouts.rewards, rollouts.group_size
    everyone = config.baseline == "batch"
    parts = distributed.gather_objects(rewards) if everyone else [rewards]  # ranks may have unequal shares
    advantages = group_advantages(torch.cat(parts), n, baseline=config.baseline, normalize=config.normalize)
    rollouts.advantages = advantages.split([len(part) for part in parts])[distributed.rank() if everyone else 0]
    rollouts.used = rewards.isfinite()
    if config.drop_constant_groups != "none":
        looked_at = rewards if config.drop_constant_groups == "reward" else rollouts.judged_correct  # (B,)
        rollouts.used &= ~constant_groups(looked_at.reshape(-1, n)).repeat_interleave(n)
    if truncated == "mask":
        rollouts.used &= ~rollouts.truncated


def constant_groups(groups: Tensor, tolerance: float = 1e-6) -> Tensor:
    """True for a group (Q, n) whose rewards, NaN left out, do not vary by more than ``tolerance``. (Q,)"""
    judged = groups.isfinite()  # (Q, n)
    return groups.where(judged, -torch.inf).amax(1) - groups.where(judged, torch.inf).amin(1) <= tolerance


def zscore(values: Tensor, lengths: Tensor) -> Tensor:
    """z-score of each token within its sequence, by the population standard deviation.

    0 where the values of a sequence do not vary, and for a value that is not finite: it was not measured, and enters
    no statistic.

    Args:
        values: (B, T); lengths: (B,) completion tokens.

    Returns:
        (B, T) float64 without gradient.
    """
    counted = token_grid(lengths, values.shape[1]) & values.isfinite()  # (B, T)
    count = counted.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    values = torch.where(counted, values.detach(), 0.0).double()  # (B, T)
    mean = values.sum(1, keepdim=True) / count  # (B, 1)
    centred = torch.where(counted, values - mean, 0.0)  # (B, T)
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()  # (B, 1)
    return torch.where(std > NOISE * mean.abs(), centred / std, 0.0)


def unit_norm(values: Tensor, lengths: Tensor) -> Tensor:
    """v / ||v|| of each sequence, v = x - mean / std: what the published code of IAPO makes of its scores.

    It means a z-score there, but divides the mean alone by the (sample) standard deviation. Args and special cases
    as in :func:`zscore`; (B, T) float64 without gradient.
    """
    counted = token_grid(lengths, values.shape[1]) & values.isfinite()  # (B, T)
    count = counted.sum(1, keepdim=True)  # (B, 1)
    values = torch.where(counted, values.detach(), 0.0).double()  # (B, T)
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)  # (B, 1)
    squares = torch.where(counted, values - mean, 0.0).square().sum(1, keepdim=True)  # (B, 1)
    std = (squares / (count - 1).clamp(min=1)).sqrt()  # (B, 1)
    shifted = torch.where(counted & (std > NOISE * mean.abs()), values - mean / std, 0.0)  # (B, T)
    return shifted / shifted.norm(dim=1, keepdim=True).clamp(min=1e-300)


NORMS = {"zscore": zscore, "l2": unit_norm}


def blend(advantages: Tensor, scores: Tensor, lengths: Tensor, *, how: str, weight: float) -> Tensor:
    """AIPO's blend with mutual information (Alg. 1, line 34): A + w z(MI), or A (1 + w z(MI)).

    Args:
        advantages: (B,); scores: (B, T) MI; lengths: (B,) completion tokens.
        how: ``additive``, ``multiplicative`` or ``none``.

    Returns:
        (B, T), or ``advantages`` itself with ``how="none"``.
    """
    if how == "none":
        return advantages
    z = zscore(scores, lengths).to(advantages)  # (B, T)
    if how == "additive":
        return advantages[:, None] + weight * z
    if how == "multiplicative":
        return advantages[:, None] * (1 + weight * z)
    raise ValueError(f"unknown blend {how!r}")


def information_advantages(
    advantages: Tensor,
    information: Tensor,
    confidence: Tensor,
    correct: Tensor,
    lengths: Tensor,
    *,
    alpha: float = 1e-2,
    beta: float = 1e-2,
    norm: str = "zscore",
) -> Tensor:
    """A + alpha norm(s) + beta norm(+-c), norm within the sequence (IAPO, arXiv 2602.19049).

    A token without s (NaN: a stride left it out) gets no such bonus and norm(s) is taken over the others, because
    nothing is known about it; a scorer that means its value for several tokens has to give it to each of them.

    Args:
        advantages: (B,), normalised within the group.
        information: (B, T) s, how far a token lowers the entropy of the answer, in nats.
        confidence: (B, T) c, how sure the policy that drew the tokens was of each; its sign turns in a rollout that is
            wrong.
        correct: (B,) bool; lengths: (B,) completion tokens.
        norm: ``zscore``, or ``l2`` (:func:`unit_norm`).

    Returns:
        (B, T)
    """
    sign = torch.where(correct.bool(), 1.0, -1.0)[:, None]  # (B, 1)
    scaled = NORMS[norm]
    bonus = alpha * scaled(information, lengths) + beta * scaled(sign * confidence, lengths)  # (B, T)
    return advantages[:, None] + bonus.to(advantages)


def reallocate_by_entropy(
    advantages: Tensor,
    entropy: Tensor,
    lengths: Tensor,
    *,
    mean: float,
    std: float,
    alpha: float = 0.2,
    phi: float = 2.0,
) -> Tensor:
    """A + alpha sign(A) clip(z(H), +-|A| / phi): more for uncertain tokens, never of another sign (HAPO, 2604.11056).

    Args:
        advantages: (B,); entropy: (B, T) nats (not finite: as if it were the mean); lengths: (B,).
        mean, std: of the entropies of the whole batch, over all ranks; entropies that do not vary change nothing.

    Returns:
        (B, T)

    Raises:
        ValueError: alpha is not in [0, phi), so that a sign could change.
    """
    if not 0 <= alpha < phi:
        raise ValueError(f"alpha must lie in [0, phi) for signs to be kept, got alpha {alpha} and phi {phi}")
    rows = advantages[:, None]  # (B, 1)
    z = torch.zeros_like(entropy, dtype=torch.float64)  # (B, T)
    if std > NOISE * abs(mean):
        measured = token_grid(lengths, entropy.shape[1]) & entropy.isfinite()  # (B, T)
        z = torch.where(measured, (entropy.detach().double() - mean) / std, 0.0)
    bound = rows.abs() / phi  # (B, 1)
    return rows + alpha * rows.sign() * z.to(rows).clamp(-bound, bound)


def entropy_quadrants(advantages: Tensor, entropy: Tensor, lengths: Tensor, *, threshold: float) -> Tensor:
    """Where a token stands in HAPO's decomposition (arXiv 2604.11056).

    Args:
        advantages: (B,); entropy: (B, T) nats, high if above ``threshold``; lengths: (B,).

    Returns:
        (B, T) int64, an index into :data:`QUADRANTS`: 0 A > 0 and high, 1 A > 0 and low, 2 A < 0 and high, 3 A < 0
        and low; -1 in none of them: padding, an entropy that is not finite, or A = 0.
    """
    rows = advantages[:, None]  # (B, 1)
    quadrant = torch.where(rows > 0, 0, 2) + torch.where(entropy > threshold, 0, 1)  # (B, T)
    placed = token_grid(lengths, entropy.shape[1]) & entropy.isfinite() & (rows != 0)  # (B, T)
    return torch.where(placed, quadrant, -1)


def weight_tokens(advantages: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    """A times the token's weight, weights having mean 1 over a trajectory (ARCA; attention entropy).

    Args:
        advantages: (B,); weights: (B, T), not negative, in any unit; lengths: (B,) completion tokens.

    Returns:
        (B, T). All weights 0, as an adapter gives before its first update: A for every token.
    """
    return advantages[:, None] * _mean_one(weights, lengths).to(advantages)


def subtract_token_baseline(
    advantages: Tensor, energy: Tensor, lengths: Tensor, group_size: int, *, tail: Tensor | None = None
) -> Tensor:
    """A_t = R - B_t with the token baseline of least variance (OTB, arXiv 2602.07078).

    B_t = sum_i R_i W_it / sum_i W_it over the rollouts i of a group that have a token t, W_it the energies of i summed
    up to t. What all rewards of a group have in common cancels, so advantages serve as rewards. Where all W_it are 0
    every rollout weighs the same. A rollout without a measured token is in no sum.

    Args:
        advantages: (B,) R minus anything that a group shares, rollouts of one question adjacent.
        energy: (B, T) not negative; lengths: (B,).
        tail: (B,) advantage of the tokens of a rollout that all others of its group are too short for; there R is its
            own baseline and None gives 0.

    Returns:
        (B, T)
    """
    there = token_grid(lengths, energy.shape[1]) & energy.isfinite()  # (B, T)
    paths = torch.where(there, energy.detach(), 0.0).double().cumsum(1) * there  # (B, T)

    def over_group(values: Tensor) -> Tensor:
        """Sums of (B, T) over the rollouts of each group, for each of them. (B, T)"""
        sums = values.reshape(-1, group_size, values.shape[1]).sum(1)  # (Q, T)
        return sums.repeat_interleave(group_size, 0)

    weights = torch.where(over_group(paths) > 0, paths, there.double())  # (B, T)
    rewards = advantages.double()[:, None]  # (B, 1)
    total = torch.where(over_group(there.double()) > 0, over_group(weights), 1.0)  # (B, T)
    shaped = (rewards - over_group(rewards * weights) / total).to(advantages)  # (B, T)
    alone = over_group(there.double()) == 1  # (B, T)
    return torch.where(alone, 0.0 if tail is None else tail[:, None].to(advantages), shaped)


def gini(weights: Tensor, lengths: Tensor) -> Tensor:
    """Gini coefficient of the weights of each trajectory: 0 all equal, 1 - 1/T one token has everything.

    Args and special cases as in :func:`weight_tokens`; (B,) float64.
    """
    shares = _mean_one(weights, lengths)  # (B, T)
    tokens = token_grid(lengths, weights.shape[1])  # (B, T)
    ordered = torch.where(tokens, shares, torch.inf).sort(1).values  # (B, T) ascending, padding last
    rank = torch.arange(1, weights.shape[1] + 1, device=weights.device)  # (T,)
    count = lengths[:, None]  # (B, 1)
    spread = torch.where(tokens, (2 * rank - count - 1) * ordered, 0.0).sum(1)  # (B,)
    return spread / lengths.clamp(min=1).square()


def effective_token_ratio(weights: Tensor, lengths: Tensor) -> Tensor:
    """(sum w)^2 / (T sum w^2) of each trajectory: 1 all equal, 1/T one token has everything.

    Args and special cases as in :func:`weight_tokens`; (B,) float64, 1 for an empty completion.
    """
    squares = _mean_one(weights, lengths).square().sum(1)  # (B,) at least the number of tokens
    return lengths.clamp(min=1) / squares.clamp(min=1)


def _mean_one(weights: Tensor, lengths: Tensor) -> Tensor:
    """(B, T) -> (B, T) float64 of mean 1 over the tokens of each row, 0 elsewhere."""
    tokens = token_grid(lengths, weights.shape[1])  # (B, T)
    weights = torch.where(tokens, weights.detach(), 0.0).double()  # (B, T)
    mean = weights.sum(1, keepdim=True) / lengths.clamp(min=1)[:, None]  # (B, 1)
    return torch.where(mean == 0, tokens.double(), weights / mean)
