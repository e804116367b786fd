"""What forward passes without gradient tell about completion tokens, beyond mutual information.

``entropy``      of the policy over the whole vocabulary, nats
``certainty``    KL from the uniform distribution to the policy, nats (INTUITOR)
``information``  how far a token lowers the entropy of an early answer, nats (IAPO)
``residual``     norm of what the adapters change in the token's hidden state (ARCA)
``attention``    normalised entropy of the attention row that predicts the token
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aipo import distributed
from aipo.advantage import (
    effective_token_ratio,
    entropy_quadrants,
    gini,
    information_advantages,
    reallocate_by_entropy,
    weight_tokens,
)
from aipo.config import Config
from aipo.model.adapters import adapters_off, residual
from aipo.rollouts import MicroBatch, Rollouts, filler, pad
from aipo.sharding import Sharded
from aipo.tokens.attention import AttentionEntropy, attention_weights
from aipo.tokens.early_exit import early_exit_trees, information_gain


def token_signals(config: Config) -> set[str]:
    """What the token rules of a config need to know."""
    mask, needed = config.mask, set()
    ranked = mask.score == "entropy" and mask.rule in ("threshold", "top_fraction", "peaks_only")
    if ranked or mask.rule == "quadrant" or config.loss.kl_priority > 0 or config.advantage.tokens == "entropy":
        needed.add("entropy")
    if config.advantage.tokens in ("information", "residual", "attention"):
        needed.add(config.advantage.tokens)
    return needed


class Signals:
    """Measures signals on the training model; every call is a collective.

    Args:
        postfix: token ids that end the reasoning and open the answer, for ``information``.
    """

    def __init__(self, config: Config, sharded: Sharded, device: torch.device, *, postfix: Sequence[int]) -> None:
        self.config, self.sharded, self.device, self.postfix = config, sharded, device, postfix
        self.exit_tokens = 0  # forwarded for `information` at the last call

    @torch.no_grad()
    def measure(self, name: str, batches: Sequence[MicroBatch], rollouts: Rollouts) -> Tensor:
        """(B, T) float32, NaN in rollouts that no micro-batch holds, in padding, and where nothing is measured."""
        if name == "information":
            return self._information(batches, rollouts)
        lengths = rollouts.lengths
        values = torch.full((len(lengths), max(int(lengths.max()) if len(lengths) else 0, 1)), float("nan"))  # (B, T)
        for micro in batches:
            measured = self._pass(name, micro).float()  # (N,)
            if len(micro.rows):
                padded = pad(measured.cpu(), micro.lengths.cpu(), float("nan"))  # (b, t)
                values[micro.rows.cpu(), : padded.shape[1]] = padded
        return values

    def _pass(self, name: str, micro: MicroBatch) -> Tensor:
        """(N,), from the same number of forward passes whatever the micro-batch holds."""
        forward, model = self.sharded.forward, self.sharded.policy.model
        if name in ("entropy", "certainty"):
            return forward(micro, full=True)[name]
        if name == "residual":
            states = forward(micro)["states"]  # (N, d)
            with adapters_off(model):
                return residual(states, forward(micro)["states"])
        if name == "attention":
            with AttentionEntropy(model, micro.predictors, layers=self.config.advantage.layers) as attention:
                forward(micro)
            return attention.entropy
        raise ValueError(f"unknown signal {name!r}")

    def _information(self, batches: Sequence[MicroBatch], rollouts: Rollouts) -> Tensor:
        rows = sorted(row for micro in batches for row in micro.rows.tolist())
        lengths = torch.zeros_like(rollouts.lengths)  # (B,) 0 where not in the update
        lengths[rows] = rollouts.lengths[rows]
        trees = early_exit_trees(
            [rollouts.prompts[row // rollouts.group_size] for row in rows],
            [rollouts.completions[row].token_ids for row in rows],
            self.postfix,
            stride=self.config.advantage.stride,
            budget=self.config.optim.micro_tokens,
        )
        self.exit_tokens = sum(len(tree.tokens) for tree in trees)
        exits, entropies = [], []
        for i in range(distributed.agree_max(len(trees))):  # one at a time: a tree's attention mask is large
            micro = trees[i].micro_batch() if i < len(trees) else filler()
            entropies.append(self.sharded.forward(micro.to(self.device), full=True)["entropy"].cpu())
            where = torch.tensor(rows, dtype=torch.long)[micro.rows]
            exits.append((where, micro.lengths[: len(where)]))
        return information_gain(exits, entropies, rollouts.lengths)


def shape(rollouts: Rollouts, signals: Mapping[str, Tensor], config: Config) -> tuple[Tensor | None, Tensor | None]:
    """What the mask rule ranks tokens by, and the advantage of each token; (B, T), None where a rule needs none.

    Mutual information is neither's: it is scored inside the training forward (``aipo.selection``). Collective.
    """
    mask, advantage, lengths = config.mask, config.advantage, rollouts.lengths
    base, entropy = rollouts.advantages, signals.get("entropy")
    mean = std = 0.0
    if entropy is not None and (mask.rule == "quadrant" or advantage.tokens == "entropy"):
        mean, std = batch_mean_std(entropy)
    ranking = entropy
    if mask.rule == "quadrant" and entropy is not None:
        ranking = entropy_quadrants(base, entropy, lengths, threshold=mean).float()
    if advantage.tokens == "entropy":
        assert entropy is not None
        shaped = reallocate_by_entropy(
            base, entropy, lengths, mean=mean, std=std, alpha=advantage.alpha, phi=advantage.phi
        )
    elif advantage.tokens == "information":
        shaped = information_advantages(
            base,
            signals["information"],
            rollouts.logp_engine,
            rollouts.correct,
            lengths,
            alpha=advantage.alpha,
            beta=advantage.beta,
        )
    elif advantage.tokens == "residual":
        shaped = weight_tokens(base, signals["residual"].nan_to_num(0.0), lengths)
    elif advantage.tokens == "attention":
        weights = attention_weights(signals["attention"], lengths, strength=advantage.strength, favour=advantage.favour)
        shaped = weight_tokens(base, weights, lengths)
    else:
        return ranking, None
    return ranking, shaped


def diagnostics(rollouts: Rollouts, signals: Mapping[str, Tensor]) -> dict[str, float]:
    """Sums over this rank's rollouts of how uneven token weights are: Gini coefficient, share of tokens that count."""
    if "residual" not in signals or not len(rollouts.completions):
        return {}
    weights = signals["residual"].nan_to_num(0.0)
    return {
        "gini": float(gini(weights, rollouts.lengths).sum()),
        "effective_tokens": float(effective_token_ratio(weights, rollouts.lengths).sum()),
    }


def batch_mean_std(values: Tensor) -> tuple[float, float]:
    """Mean and population standard deviation of the finite values of all ranks; 0 and 0 where there are none."""
    finite = values[values.isfinite()].double()
    count, total = distributed.all_reduce(
        torch.tensor([len(finite), float(finite.sum())], dtype=torch.float64)
    ).tolist()
    mean = total / max(count, 1.0)
    squares = distributed.all_reduce(((finite - mean) ** 2).sum())
    return mean, math.sqrt(float(squares) / max(count, 1.0))
