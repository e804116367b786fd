"""What is measured of completion tokens beyond mutual information, and the rules that turn it into advantages.

A new score of tokens is a function, a line of :data:`MEASURES`, and its name in ``Measured`` of
:mod:`aipo.config.base`: then ``mask.score`` can name it. A new rule of ``advantage.tokens`` is a function, a line
of :data:`RULES`, and its name there. Mutual information is scored inside the training forward (:mod:`aipo.selection`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aipo import distributed
from aipo.advantage import (
    effective_token_ratio,
    entropy_quadrants,
    gini,
    information_advantages,
    reallocate_by_entropy,
    subtract_token_baseline,
    weight_tokens,
)
from aipo.config import Config
from aipo.config.sections import AdvantageConfig
from aipo.layout import MicroBatch, filler
from aipo.model.adapters import adapters_off, residual
from aipo.passes import Passes
from aipo.rollouts import Rollouts
from aipo.tokens.attention import AttentionEntropy, attention_weights
from aipo.tokens.early_exit import (
    cumulative_information,
    early_exit_trees,
    information_gain,
    postfix_ids,
    smoothed_gain,
)

# -- measures --------------------------------------------------------------------------------------------------------


Signals = Mapping[str, Tensor]
"""what measures said, by name, (B, T) each"""
Batches = Sequence[MicroBatch]
Of = Callable[[Passes, Batches, Rollouts, Signals], tuple[Tensor, int]]
"""... and what earlier measures said -> (B, T), tokens read beyond them"""


@dataclass(frozen=True)
class Measure:
    """How one number a token is had from forward passes without gradient."""

    of: Of
    passes: float  # forward passes over the batch; the early exits' depend on stride and lengths
    meaning: str


def by_micro_batch(read: Callable[[Passes, MicroBatch], Tensor]) -> Of:
    """A measure that looks at one micro-batch alone: (N,), from the same number of passes whatever it holds."""

    def of(passes: Passes, batches: Batches, rollouts: Rollouts, known: Signals) -> tuple[Tensor, int]:
        return passes.per_token(batches, rollouts.lengths, lambda micro: read(passes, micro)), 0

    return of


def _vocabulary(name: str) -> Of:
    """One of the numbers of :func:`aipo.policy.vocabulary_statistics`."""
    return by_micro_batch(lambda passes, micro: passes.sharded.forward(micro, full=True)[name])


def _residual(passes: Passes, micro: MicroBatch) -> Tensor:
    states = passes.states(micro)  # (N, d)
    with adapters_off(passes.sharded.policy.model):
        return residual(states, passes.states(micro))


def _attention(passes: Passes, micro: MicroBatch) -> Tensor:
    layers = passes.config.advantage.layers
    with AttentionEntropy(passes.sharded.policy.model, micro.predictors, layers=layers) as attention:
        passes.states(micro)
    return attention.entropy


@torch.no_grad()
def _information(passes: Passes, batches: Batches, rollouts: Rollouts, known: Signals) -> tuple[Tensor, int]:
    reading = passes.config.advantage.information
    if reading == "next_token":
        entropy = known.get("entropy")  # (B, T)
        if entropy is None:
            entropy, _ = MEASURES["entropy"].of(passes, batches, rollouts, known)
        ends = torch.arange(entropy.shape[1] + 1) == rollouts.lengths[:, None]  # (B, T + 1)
        behind = torch.nn.functional.pad(entropy, (0, 1), value=math.nan)  # (B, T + 1)
        return smoothed_gain(behind.masked_fill(ends, 0.0)), 0
    rows = sorted(row for micro in batches for row in micro.rows.tolist())
    prompts, completions = rollouts.each_prompt, rollouts.each_completion
    trees = early_exit_trees(
        [prompts[row] for row in rows],
        [completions[row] for row in rows],
        postfix_ids(passes.prompter.tokenizer, thinking=passes.config.data.thinking),
        stride=passes.config.advantage.stride,
        budget=passes.config.optim.micro_tokens,
        smoothed=reading == "smoothed",
    )
    exits, entropies = [], []
    for i in range(distributed.agree_max(len(trees))):  # one at a time: a tree's attention mask is large
        micro = trees[i].micro_batch() if i < len(trees) else filler()
        entropies.append(passes.sharded.forward(micro.to(passes.device), full=True)["entropy"].cpu())
        where = torch.tensor(rows, dtype=torch.long)[micro.rows]
        exits.append((where, micro.lengths[: len(where)]))
    gain = information_gain(exits, entropies, rollouts.lengths, smoothed=reading == "smoothed")  # (B, T)
    return gain, sum(len(tree.tokens) for tree in trees)


def _surprisal(passes: Passes, batches: Batches, rollouts: Rollouts, known: Signals) -> tuple[Tensor, int]:
    drawn = rollouts.logp_engine  # (B, T)
    return passes.per_token(batches, rollouts.lengths, lambda micro: -micro.ragged_of(drawn)), 0


def _annotated(value: float) -> Of:
    """``value`` at the tokens that the problem says decide its answer, ``1 - value`` at all others; no pass."""

    def of(passes: Passes, batches: Batches, rollouts: Rollouts, known: Signals) -> tuple[Tensor, int]:
        lengths = rollouts.lengths.tolist()
        values = torch.full((len(lengths), max([*lengths, 1])), math.nan)  # (B, T)
        for row in (row for micro in batches for row in micro.rows.tolist()):
            values[row, : lengths[row]] = 1 - value
            values[row, [place for place in rollouts.question_of(row).critical if place < lengths[row]]] = value
        return values, 0

    return of


MEASURES = {
    "entropy": Measure(_vocabulary("entropy"), 1, "of the policy over the whole vocabulary, nats"),
    "certainty": Measure(_vocabulary("certainty"), 1, "KL from the uniform distribution to the policy (INTUITOR)"),
    "energy": Measure(_vocabulary("energy"), 1, "squared norm of its log-probability's gradient by the logits (OTB)"),
    "gap": Measure(_vocabulary("gap"), 1, "log-probability of the most probable token less that of the next, nats"),
    "residual": Measure(by_micro_batch(_residual), 2, "norm of what adapters change in the hidden state (ARCA)"),
    "attention": Measure(by_micro_batch(_attention), 1, "normalised entropy of the row that predicts the token"),
    "information": Measure(_information, math.nan, "how far a token lowers the entropy of an early answer (IAPO)"),
    "surprisal": Measure(_surprisal, 0, "minus its log-probability where it was drawn, nats"),
    "critical": Measure(_annotated(1.0), 0, "1 where the problem says that a token decides its answer (an oracle)"),
    "filler": Measure(_annotated(0.0), 0, "1 at all other tokens"),
}


def measure(
    names: set[str], passes: Passes, batches: Batches, rollouts: Rollouts
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Each named measure, (B, T) float32, NaN in rollouts that no micro-batch holds, in padding, and where nothing is
    measured; and sums for the log. A collective."""
    signals: dict[str, Tensor] = {}
    read = 0
    for name in sorted(names):  # the same order on all ranks; the entropy before the information made of it
        signals[name], more = MEASURES[name].of(passes, batches, rollouts, signals)
        read += more
    sums = _unevenness(rollouts, signals)
    if passes.config.advantage.information == "difference":  # which alone adds up to eq. 7
        sums |= _information_sums(signals)
    return signals, sums | {"exit_tokens": float(read)}


def _information_sums(signals: Signals) -> dict[str, float]:
    """Of eq. 7 over this rank's rollouts that were scored, and their number."""
    if "information" not in signals:
        return {}
    gain = signals["information"]  # (B, T)
    scored = gain.isfinite().any(1)  # (B,)
    return {
        "information": float(cumulative_information(gain)[scored].sum()),
        "information_rollouts": float(scored.sum()),
    }


def _unevenness(rollouts: Rollouts, signals: Signals) -> dict[str, float]:
    """Sums over this rank's rollouts that were measured of how uneven token weights are: Gini coefficient, share of
    tokens that count; and their number."""
    if "residual" not in signals or not len(rollouts.completions):
        return {}
    measured = signals["residual"].isfinite().any(1)  # (B,)
    weights = signals["residual"].nan_to_num(0.0)  # (B, T)
    return {
        "gini": float(gini(weights, rollouts.lengths)[measured].sum()),
        "effective_tokens": float(effective_token_ratio(weights, rollouts.lengths)[measured].sum()),
        "residual_rollouts": float(measured.sum()),
    }


def needed(config: Config) -> set[str]:
    """The measures that a config's rules read."""
    mask, names = config.mask, set[str]()
    if mask.score != "mi" and (mask.ranks or mask.rule == "quadrant"):
        names.add(mask.score)
    if config.advantage.tokens != "none":
        names |= RULES[config.advantage.tokens].reads(config.advantage)
    return names


# -- rules -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenRule:
    """``advantage.tokens``: the measures that it reads, and what it makes of them."""

    reads: Callable[[AdvantageConfig], set[str]]
    of: Callable[[Rollouts, Signals, AdvantageConfig], Tensor]  # (B, T) each -> (B, T)
    source: str


def _reallocated(rollouts: Rollouts, signals: Signals, config: AdvantageConfig) -> Tensor:
    entropy = signals["entropy"]  # (B, T)
    mean, std = batch_mean_std(entropy)
    return reallocate_by_entropy(
        rollouts.advantages, entropy, rollouts.lengths, mean=mean, std=std, alpha=config.alpha, phi=config.phi
    )


def _informed(rollouts: Rollouts, signals: Signals, config: AdvantageConfig) -> Tensor:
    return information_advantages(
        rollouts.advantages,
        signals["information"],
        -signals["entropy"] if config.signed == "entropy" else rollouts.logp_engine.exp(),
        rollouts.correct,
        rollouts.lengths,
        alpha=config.information_weight,
        beta=config.beta,
        norm=config.token_norm,
    )


def _weighted_by_residual(rollouts: Rollouts, signals: Signals, config: AdvantageConfig) -> Tensor:
    return weight_tokens(rollouts.advantages, signals["residual"].nan_to_num(0.0), rollouts.lengths)


def _weighted_by_attention(rollouts: Rollouts, signals: Signals, config: AdvantageConfig) -> Tensor:
    entropy, lengths = signals["attention"], rollouts.lengths  # (B, T), (B,)
    weights = attention_weights(entropy, lengths, strength=config.strength, favour=config.favour)
    return weight_tokens(rollouts.advantages, weights, lengths)


def _less_optimal_baseline(rollouts: Rollouts, signals: Signals, config: AdvantageConfig) -> Tensor:
    energy, lengths = signals["energy"], rollouts.lengths  # (B, T), (B,)
    tail = rollouts.rewards.nan_to_num(0.0) if config.tail == "reward" else None
    return subtract_token_baseline(rollouts.advantages, energy, lengths, rollouts.group_size, tail=tail)


def _only(name: str) -> Callable[[AdvantageConfig], set[str]]:
    return lambda config: {name}


def _information_and_entropy(config: AdvantageConfig) -> set[str]:
    return {"information", "entropy"} if config.signed == "entropy" else {"information"}


RULES = {
    "entropy": TokenRule(_only("entropy"), _reallocated, "HAPO, arXiv 2604.11056"),
    "information": TokenRule(_information_and_entropy, _informed, "IAPO, arXiv 2602.19049"),
    "residual": TokenRule(_only("residual"), _weighted_by_residual, "ARCA"),
    "attention": TokenRule(_only("attention"), _weighted_by_attention, "attention entropy, arXiv 2605.07660"),
    "baseline": TokenRule(_only("energy"), _less_optimal_baseline, "OTB, arXiv 2602.07078"),
}


def mask_ranking(rollouts: Rollouts, signals: Signals, config: Config) -> Tensor | None:
    """What the mask rule ranks tokens by, (B, T); None for mutual information, or if it ranks none. A collective."""
    ranking = None if config.mask.score == "mi" else signals.get(config.mask.score)  # (B, T)
    if config.mask.rule == "quadrant" and ranking is not None:
        mean, _ = batch_mean_std(ranking)
        ranking = entropy_quadrants(rollouts.advantages, ranking, rollouts.lengths, threshold=mean).float()  # (B, T)
    return ranking


def token_advantages(rollouts: Rollouts, signals: Signals, config: Config) -> Tensor | None:
    """The advantage of each token by ``advantage.tokens``, (B, T); None if a rollout has one for all. A collective."""
    if config.advantage.tokens == "none":
        return None
    return RULES[config.advantage.tokens].of(rollouts, signals, config.advantage)


def batch_mean_std(values: Tensor) -> tuple[float, float]:
    """Mean and population standard deviation of the finite values of all ranks; 0 and 0 where there are none."""
    finite = values[values.isfinite()].double()
    count, total = distributed.all_reduce(
        torch.tensor([len(finite), float(finite.sum())], dtype=torch.float64)
    ).tolist()
    mean = total / max(count, 1.0)
    squares = distributed.all_reduce(((finite - mean) ** 2).sum())
    return mean, math.sqrt(float(squares) / max(count, 1.0))
