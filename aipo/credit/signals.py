"""Every signal of tokens there is, for the same rollouts: (B, T) each, NaN where one says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from aipo.config import Config
from aipo.config.sections import MIConfig
from aipo.errors import UserError
from aipo.layout import MicroBatch, token_grid
from aipo.passes import Passes
from aipo.problems.problem import Problem
from aipo.problems.prompts import Prompter
from aipo.rollouts import Rollouts
from aipo.selection import TokenSelector
from aipo.sharding import Sharded
from aipo.tokens.table import MEASURES, measure

WRONG = " (wrong gold)"


def readings(config: MIConfig, *, solutions: bool) -> Iterator[tuple[str, MIConfig]]:
    """Every reading of the mutual information, by name: estimator, its features, what is normalised, the gold text."""
    kinds = [("coordinate", features, normalized) for features in ("random", "quadrature") for normalized in NORMALIZED]
    kinds += [("pointwise", "random", "none"), ("position", "random", "none")]
    for estimator, features, normalized in kinds:
        for gold_text in ("answer", "boxed", "question_answer", *(["solution"] if solutions else [])):
            # few features where they are squared, or deterministic
            count = min(config.num_features, 64) if features == "random" else min(config.num_features, 16)
            keys = {"estimator": estimator, "features": features, "normalized": normalized, "gold_text": gold_text}
            made = MIConfig.model_validate(config.model_dump() | keys | {"num_features": count})
            parts = [estimator, *([features] if estimator == "coordinate" else []), *NORMALIZED[normalized], gold_text]
            yield "mi " + " ".join(parts), made


NORMALIZED: dict[str, list[str]] = {"none": [], "cca": ["cca"]}


def all_signals(
    config: Config,
    sharded: Sharded,
    prompter: Prompter,
    problems: Sequence[Problem],
    rollouts: Rollouts,
    device: torch.device,
    only: Sequence[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Names and (B, T) float32 values, one after the other, each from forward passes of its own; all, or ``only`` some.

    Args:
        problems: among which the wrong golds are found; those of the rollouts may be others.
    """
    passes = Passes(config, sharded, prompter, device)
    batches = passes.batches_of(rollouts)
    inside = token_grid(rollouts.lengths, int(rollouts.lengths.max()))  # (B, T)
    place = torch.arange(inside.shape[1]) / rollouts.lengths[:, None]  # (B, T)
    noise = torch.rand(inside.shape, generator=torch.Generator().manual_seed(config.seed))  # (B, T)
    makers: dict[str, Callable[[], Tensor]] = {
        "surprisal": lambda: -rollouts.logp_engine,
        "position (early)": lambda: -place,
        "random": lambda: noise,
    }
    asked = rollouts.problems
    for name in MEASURES:
        annotated = name not in ("critical", "filler") or all(problem.critical for problem in asked)
        if annotated and (name != "residual" or config.lora.rank):
            makers[name] = partial(_measured, name, passes, batches, rollouts)
    for name, mi in readings(config.mi, solutions=all(problem.solution for problem in asked)):
        for twin, control in (("", "none"), (WRONG, "shuffled")):
            changed = config.model_copy(update={"mi": mi.model_copy(update={"gold_control": control})})
            makers[name + twin] = partial(_scores, changed, sharded, prompter, problems, rollouts, device)
    if unknown := set(only) - makers.keys():
        raise UserError(f"--signals: {', '.join(sorted(unknown))} unknown: there are {', '.join(makers)}")
    for name, make in makers.items():
        if not only or name in only:
            yield name, make().where(inside, torch.nan)


def _measured(name: str, passes: Passes, batches: Sequence[MicroBatch], rollouts: Rollouts) -> Tensor:
    return measure({name}, passes, batches, rollouts)[0][name]  # (B, T)


def _scores(
    config: Config,
    sharded: Sharded,
    prompter: Prompter,
    problems: Sequence[Problem],
    rollouts: Rollouts,
    device: torch.device,
) -> Tensor:
    passes, selector = Passes(config, sharded, prompter, device, problems), TokenSelector(config)
    selection = selector.begin(rollouts, passes.gold_states(rollouts.problems), kappa=0.0, step=0)
    selection.score_all(passes.batches_of(rollouts), passes.states)
    return selection.scores  # (B, T)
