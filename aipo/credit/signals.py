"""Every signal of tokens there is, for the same rollouts: (B, T) each, NaN where one says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args
from zlib import crc32

import torch
from torch import Tensor

from aipo.config import Config
from aipo.config.base import Features
from aipo.config.sections import MIConfig
from aipo.credit.table import WRONG
from aipo.errors import UserError
from aipo.layout import MicroBatch, token_grid
from aipo.passes import Passes
from aipo.problems.problem import Problem
from aipo.rollouts import Rollouts
from aipo.selection import Selection, TokenSelector
from aipo.tokens.table import MEASURES, measure

VOCABULARY = ("entropy", "certainty", "energy", "gap")  # what one forward pass says of all tokens, beside the states


def readings(config: MIConfig, *, solutions: bool) -> Iterator[tuple[str, MIConfig]]:
    """Every reading of the mutual information, by name: estimator, its features, what is normalised, the gold text.

    The coordinates' bandwidth is the config's; between whole states, which lie further apart, the median. The number
    of features is the config's too, or the default where the config has few because it takes quadrature: at most 16 of
    quadrature and 64 between whole states.
    """
    random = config.num_features if config.features != "quadrature" else MIConfig().num_features
    kinds = [("coordinate", features, normalized) for features in get_args(Features) for normalized in NORMALIZED]
    kinds += [(name, features, "none") for name in ("pointwise", "position") for features in ("random", "orthogonal")]
    for estimator, features, normalized in kinds:
        for gold_text in ("answer", "boxed", "question_answer", *(["solution"] if solutions else [])):
            keys: dict[str, Any] = {
                "estimator": estimator,
                "features": features,
                "normalized": normalized,
                "gold_text": gold_text,
                "num_features": random,
            }
            if features == "quadrature":  # deterministic: 16 are enough
                keys["num_features"] = min(config.num_features, 16)
            if estimator != "coordinate":  # features of whole states are squared
                keys |= {"num_features": min(random, 64), "sigma": "median"}
            made = MIConfig.model_validate(config.model_dump() | keys)
            yield "mi " + " ".join([estimator, features, *NORMALIZED[normalized], gold_text]), made


NORMALIZED: dict[str, list[str]] = {"none": [], "cca": ["cca"]}


def named(config: Config, problems: Sequence[Problem], only: Sequence[str] = ()) -> list[str]:
    """Signals that there are of a model and problems; UserError if one of ``only`` is not among them."""
    found = ["position (early)", "random"]
    for name in MEASURES:
        annotated = name not in ("critical", "filler") or all(problem.critical for problem in problems)
        if annotated and (name != "residual" or config.lora.rank):
            found.append(name)
    for name, _ in readings(config.mi, solutions=all(problem.solution for problem in problems)):
        found += [name, name + WRONG]
    if unknown := set(only) - set(found):
        raise UserError(f"--signals: {', '.join(sorted(unknown))} unknown: there are {', '.join(found)}")
    return [name for name in found if not only or name in only]


def all_signals(
    passes: Passes, problems: Sequence[Problem], rollouts: Rollouts, only: Sequence[str] = ()
) -> dict[str, Callable[[], Tensor]]:
    """What makes each signal, by name: (B, T) float32 when called; all, or ``only`` some.

    Those that read hidden states or the whole vocabulary share one forward pass, the others have passes of their own.

    Args:
        problems: among which the wrong golds are found; those of the rollouts may be others.
    """
    config, sharded, prompter, device = passes.config, passes.sharded, passes.prompter, passes.device
    batches = passes.batches_of(rollouts)
    inside = token_grid(rollouts.lengths, int(rollouts.lengths.max()))  # (B, T)
    place = torch.arange(inside.shape[1]) / rollouts.lengths[:, None]  # (B, T)
    drawn = crc32(f"{config.seed} {rollouts.problems[0].id}".encode())  # another for every batch
    noise = torch.rand(inside.shape, generator=torch.Generator().manual_seed(drawn))  # (B, T)
    said: dict[int, dict[str, Tensor]] = {}  # of each micro-batch, on the host
    golds: dict[str, Tensor] = {}  # (Q, d) each

    def read(micro: MicroBatch) -> dict[str, Tensor]:
        if id(micro) not in said:
            with torch.no_grad():
                said[id(micro)] = {k: v.cpu() for k, v in sharded.forward(micro, full=True).items()}
        return said[id(micro)]

    def scores(mi: MIConfig) -> Tensor:
        changed = config.model_copy(update={"mi": mi})
        key = f"{mi.gold_text} {mi.gold_control}"
        if key not in golds:
            golds[key] = Passes(changed, sharded, prompter, device, problems).gold_states(rollouts.problems)
        selection = Selection(TokenSelector(changed), rollouts, golds[key], kappa=0.0, step=0)
        selection.score_all(batches, lambda micro: read(micro)["states"].to(device))
        return selection.scores  # (B, T)

    def measured(name: str) -> Tensor:
        if name in VOCABULARY:
            return passes.per_token(batches, rollouts.lengths, lambda micro: read(micro)[name])  # (B, T)
        return measure({name}, passes, batches, rollouts)[0][name]  # (B, T)

    makers: dict[str, Callable[[], Tensor]] = {"position (early)": lambda: -place, "random": lambda: noise}
    makers |= {name: partial(measured, name) for name in MEASURES}
    for name, mi in readings(config.mi, solutions=True):
        makers[name] = partial(scores, mi)
        makers[name + WRONG] = partial(scores, mi.model_copy(update={"gold_control": "shuffled"}))
    return {name: partial(_within, makers[name], inside) for name in named(config, rollouts.problems, only)}


def _within(make: Callable[[], Tensor], inside: Tensor) -> Tensor:
    return make().where(inside, torch.nan)  # (B, T)
