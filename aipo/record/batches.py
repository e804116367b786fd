"""The batch of a step as its update read it, from which :mod:`aipo.replay` runs that update again.

``replay/step-000012-rank-0.pt``: a file a rank, about 8 bytes a completion token. They are kept back to the oldest
checkpoint but the best one, since an update cannot be run again without the weights before it; those of steps whose
loss or gradient was not finite lie in ``bad_steps/`` and stay.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aipo import distributed
from aipo.errors import TrainingError, UserError
from aipo.layout import pad, unpad
from aipo.problems.datasets import Problem
from aipo.record.checkpoints import step_of
from aipo.rollout.base import Completion, FinishReason
from aipo.rollouts import Rollouts
from aipo.selection import Selection

REPLAY, BAD = "replay", "bad_steps"
"""The two folders of a run in which batches lie."""


def write_batch(folder: Path, step: int, rollouts: Rollouts, selection: Selection) -> None:
    """This rank's share of a step, and the mask that came of it; TrainingError where it cannot be written."""
    content = {
        "world_size": distributed.world_size(),
        "kappa": selection.kappa,
        "prefix": rollouts.prefix,
        "problems": [problem.id for problem in rollouts.problems],
        "prompts": [torch.tensor(ids, dtype=torch.int32) for ids in rollouts.prompts],
        "group_size": rollouts.group_size,
        "ids": rollouts.ids,
        "lengths": rollouts.lengths,
        "tokens": torch.tensor([t for ids in rollouts.each_completion for t in ids], dtype=torch.int32),  # (N,)
        "logp_engine": unpad(rollouts.logp_engine, rollouts.lengths),  # (N,)
        "truncated": rollouts.truncated,
        "rewards": rollouts.rewards,
        "correct": rollouts.correct,
        "judged": rollouts.judged,
        "lineage": rollouts.lineage,
        "update": rollouts.update,
        "extra_tokens": rollouts.extra_tokens,
        "mask": unpad(selection.mask, rollouts.lengths),  # (N,)
    }
    path = folder / f"step-{step:06d}-rank-{distributed.rank()}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch says that the disk is full
        raise TrainingError(
            f"the batch of step {step} could not be written to {path} ({error}): make room and go on with "
            "--resume auto, or set tracking.replay=false"
        ) from error


def forget_batches(folder: Path, keep: range) -> None:
    """Delete this rank's batches of steps outside ``keep``."""
    for path in folder.glob(f"step-*-rank-{distributed.rank()}.pt"):
        if step_of(path) not in keep:
            path.unlink()


def recorded_steps(run: Path) -> set[int]:
    """Steps of which at least the first rank's batch is there."""
    return {step_of(path) for folder in (REPLAY, BAD) for path in (run / folder).glob("step-*-rank-0.pt")}


def read_batch(run: Path, step: int) -> list[dict[str, Any]]:
    """What :func:`write_batch` wrote on every rank, in order of rank. UserError where it is not all there."""
    for folder in (run / REPLAY, run / BAD):
        first = folder / f"step-{step:06d}-rank-0.pt"
        if first.exists():
            shares = [torch.load(first, weights_only=True)]
            for rank in range(1, shares[0]["world_size"]):
                path = folder / f"step-{step:06d}-rank-{rank}.pt"
                if not path.exists():
                    raise UserError(f"{path} is missing: step {step} cannot be rebuilt without that rank's share")
                shares.append(torch.load(path, weights_only=True))
            return shares
    raise UserError(f"{run / REPLAY} has nothing of step {step}")


def rebuild(
    shares: list[dict[str, Any]], problems: Mapping[str, Problem], *, updates: int
) -> tuple[Rollouts, Tensor, float]:
    """The batch of all ranks as one.

    Args:
        problems: by id.
        updates: ``optim.updates_per_batch``: what a rank read in its first update comes first.

    Returns:
        Judged rollouts without advantages, their mask (B, T) and kappa. UserError for a question that is not
        among ``problems``.
    """
    parts = [_rollouts(share, problems) for share in shares]
    joined = Rollouts.joined(parts)
    joined.update = [number for part in parts for number in part.updates(updates)]
    order = sorted(range(len(joined.problems)), key=joined.update.__getitem__)
    mask = pad(torch.cat([share["mask"] for share in shares]), joined.lengths)  # (B, T)
    rows = joined.rows_of(order)
    batch = joined.take(rows)
    return batch, mask[rows], shares[0]["kappa"]


def _rollouts(share: dict[str, Any], problems: Mapping[str, Problem]) -> Rollouts:
    if unknown := [name for name in share["problems"] if name not in problems]:
        raise UserError(f"question {unknown[0]} of the record is not in data.train any more: bring the data back")
    lengths = share["lengths"].tolist()
    tokens, logps = share["tokens"].split(lengths), share["logp_engine"].split(lengths)
    ends: list[FinishReason] = ["length" if cut else "stop" for cut in share["truncated"].tolist()]
    return Rollouts(
        problems=[problems[name] for name in share["problems"]],
        prompts=[ids.tolist() for ids in share["prompts"]],
        completions=[Completion(t.tolist(), p.tolist(), end) for t, p, end in zip(tokens, logps, ends)],
        group_size=share["group_size"],
        ids=share["ids"],
        rewards=share["rewards"],
        correct=share["correct"],
        judged=share["judged"],
        texts=[""] * len(lengths),
        lineage=share["lineage"],
        update=share["update"],
        prefix=share["prefix"],
        extra_tokens=share["extra_tokens"],
    )
