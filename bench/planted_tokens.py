"""Which estimator finds tokens that are known to carry the answer?

Synthetic rollouts in which a fifth of the positions carry the gold state in a known way; prints, as a Markdown table,
the AUROC with which each estimator's scores tell them from the rest of their own rollout (1 perfect, 0.5 chance),
averaged over rollouts. About 90 seconds of one core:

    python bench/planted_tokens.py [--seed 0]

How well Fourier features reproduce exact scores on the states of a real model, and at what cost: bench/mi.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aipo.config.sections import MIConfig
from aipo.mi import exact_hsic
from aipo.scorer import TokenScorer

QUESTIONS, ROLLOUTS, TOKENS, SIZE = 24, 4, 64, 128  # rollouts are TOKENS / 2 to TOKENS tokens long
PLANTED = 0.2
SCALE = 20.0  # of a coordinate, against the default bandwidth of 50


def auroc(scores: Tensor, planted: Tensor) -> float:
    """Chance that a planted token scores above another one, ties counting half: (T,), bool (T,)."""
    difference = scores[planted][:, None] - scores[~planted]
    return ((difference > 0).float() + (difference == 0).float() / 2).mean().item()


class Bed:
    """hidden (N, d) of B rollouts one after another, gold (B, d), lengths (B,), planted (N,)."""

    def __init__(self, plant: Callable[[Tensor, Tensor, Bed], Tensor], seed: int, *, same_steps: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        rollouts = QUESTIONS * ROLLOUTS
        self.lengths = torch.randint(TOKENS // 2, TOKENS + 1, (rollouts,), generator=self.generator)
        if same_steps:
            steps = torch.rand(TOKENS, generator=self.generator) < PLANTED
            self.planted = torch.cat([steps[:length] for length in self.lengths.tolist()])
        else:
            self.planted = torch.rand(int(self.lengths.sum()), generator=self.generator) < PLANTED
        gold = self.normal(QUESTIONS, SIZE).repeat_interleave(ROLLOUTS, 0)  # (B, d)
        noise = self.normal(int(self.lengths.sum()), SIZE)
        paired = gold.repeat_interleave(self.lengths, 0)  # (N, d)
        self.hidden = SCALE * torch.where(self.planted[:, None], plant(paired, noise, self), noise)
        self.gold = SCALE * gold

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def mean_auroc(self, scores: Tensor) -> float:
        rollouts = zip(scores.split(self.lengths.tolist()), self.planted.split(self.lengths.tolist()))
        return sum(auroc(score, planted) for score, planted in rollouts) / len(self.lengths)


def mixed(strength: float) -> Callable[[Tensor, Tensor, Bed], Tensor]:
    return lambda gold, noise, _: strength * gold + (1 - strength**2) ** 0.5 * noise


def squared(gold: Tensor, noise: Tensor, _: Bed) -> Tensor:
    """Uncorrelated with the gold state, coordinate by coordinate, and yet made from it."""
    return 0.7 * (gold.square() - 1) / 2**0.5 + 0.5**0.5 * noise


def rotated(gold: Tensor, noise: Tensor, bed: Bed) -> Tensor:
    """The gold state in another basis, the same one for all: no coordinate resembles its namesake."""
    rotation, _ = torch.linalg.qr(bed.normal(SIZE, SIZE))
    return 0.7 * gold @ rotation + 0.5**0.5 * noise


def beds(seed: int) -> dict[str, Bed]:
    result = {
        "copy 0.5": Bed(mixed(0.5), seed),
        "copy 0.2": Bed(mixed(0.2), seed),
        "same steps 0.2": Bed(mixed(0.2), seed, same_steps=True),
        "squared": Bed(squared, seed),
        "rotated": Bed(rotated, seed),
        "common part": Bed(mixed(0.2), seed),
        "outliers": Bed(mixed(0.2), seed),
    }
    # All states of a transformer share a direction, in a strength that varies from token to token.
    common = result["common part"]
    direction = SCALE * common.normal(SIZE)
    common.hidden += (0.5 + 0.5 * common.normal(len(common.hidden), 1).abs()) * direction
    common.gold += direction
    # A few coordinates are far larger than the rest everywhere ("massive activations").
    outliers = result["outliers"]
    size = torch.ones(SIZE)
    size[:3] = 30.0
    outliers.hidden, outliers.gold = outliers.hidden * size, outliers.gold * size
    return result


def exact_coordinate(states: Tensor, gold: Tensor) -> Tensor:
    """(T, d), (d,) -> (T,)."""
    tokens = [part[:, :, None] for part in states.split(16)]  # (c, d, 1)
    return torch.cat([exact_hsic(part, gold[None, :, None].expand_as(part), sigma=50.0) for part in tokens])


def scorers(seed: int) -> dict[str, Callable[[Bed], Tensor]]:
    def fit(**options: Any) -> Callable[[Bed], Tensor]:
        def score(bed: Bed) -> Tensor:
            scorer = TokenScorer(MIConfig(**options), seed=seed)
            if not scorer.local:
                scorer.observe(bed.hidden, bed.gold, bed.lengths)
                scorer.reduce()
            return scorer.score(bed.hidden, bed.gold, bed.lengths)

        return score

    rows: dict[str, Callable[[Bed], Tensor]] = {
        "chance": lambda bed: bed.normal(len(bed.hidden)),
        "squared correlation": lambda bed: torch.nn.functional.cosine_similarity(
            bed.hidden - bed.hidden.mean(1, keepdim=True),
            (bed.gold - bed.gold.mean(1, keepdim=True)).repeat_interleave(bed.lengths, 0),
        ).square(),
        "coordinate, exact, σ 50": lambda bed: torch.cat(
            [exact_coordinate(states, gold) for states, gold in zip(bed.hidden.split(bed.lengths.tolist()), bed.gold)]
        ),
    }
    for features, count in (
        ("random", 256),
        ("orthogonal", 256),
        ("random", 64),
        ("quadrature", 64),
        ("quadrature", 16),
    ):
        rows[f"coordinate, {features} {count}, σ 50"] = fit(features=features, num_features=count)
    for features, count in (("random", 256), ("quadrature", 64)):
        rows[f"coordinate, {features} {count}, σ median"] = fit(features=features, num_features=count, sigma="median")
    for normalize in ("layernorm", "zscore"):
        rows[f"coordinate, random 256, σ median, {normalize}"] = fit(sigma="median", normalize=normalize)
    for features in ("random", "orthogonal"):
        rows[f"pointwise, {features} 256, σ median"] = fit(estimator="pointwise", features=features, sigma="median")
    rows["pointwise, random 256, σ 50"] = fit(estimator="pointwise")
    rows["pointwise, random 256, σ median, zscore"] = fit(estimator="pointwise", sigma="median", normalize="zscore")
    for features in ("random", "orthogonal"):
        rows[f"position, {features} 256, σ median"] = fit(
            estimator="position", features=features, sigma="median", max_positions=TOKENS
        )
    return rows


def planted_table(seed: int) -> None:
    columns = beds(seed)
    print(f"| estimator | {' | '.join(columns)} | CPU seconds |")
    print(f"|---|{'---:|' * (len(columns) + 1)}")
    for name, score in scorers(seed).items():
        start = time.process_time()
        cells = [f"{bed.mean_auroc(score(bed)):.2f}" for bed in columns.values()]
        print(f"| {name} | {' | '.join(cells)} | {time.process_time() - start:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small: threads would wait for one another
    planted_table(args.seed)


if __name__ == "__main__":
    main()
