"""Run the update of one step again:  python -m aipo.replay runs/NAME --step K

The step's batch comes from the run's record (:mod:`aipo.record.batches`): tokens, engine log-probabilities, rewards.
The weights come from the newest checkpoint before it, through the steps between, or from the initial model. Advantages,
scores, masks, loss and gradient are computed anew, on one process, and set beside what the run logged. On the same
settings they are the same; with one changed, the difference is what that one makes.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aipo import distributed
from aipo.advantage import assign
from aipo.config import Config, load_config
from aipo.errors import UserError
from aipo.inputs import check_inputs, may_go_on
from aipo.passes import Passes
from aipo.policy import make_policy
from aipo.record.batches import read_batch, rebuild, recorded_steps
from aipo.record.checkpoints import damage, step_of
from aipo.record.clock import Clock
from aipo.record.jsonl import read_jsonl
from aipo.record.reporting import reduce_metrics
from aipo.record.tracker import Tracker
from aipo.rollout.collect import Collector
from aipo.selection import TokenSelector
from aipo.sharding import Plain, Sharded, frozen_reference, shard
from aipo.threads import settle
from aipo.trainer import Trainer

COMPARED = (
    "loss/total",
    "loss/kl",
    "loss/clip_fraction",
    "loss/skipped_steps",
    "policy/grad_norm",
    "policy/entropy",
    "mask/otf",
    "mi/mean",
    "mi/skew",
    "mismatch/kl",
    "mismatch/gap",
    "mismatch/weight_mean",
    "rollout/used",
)
"""Of metrics.jsonl: what comes of the update."""


@dataclass(frozen=True)
class Settings:
    """What may differ from the run; None is as it was."""

    dtype: str | None = None
    micro_tokens: int | None = None
    zero: int | None = None  # 0: without DeepSpeed

    def overrides(self) -> list[str]:
        given = {"model.dtype": self.dtype, "optim.micro_tokens": self.micro_tokens}
        return [f"{key}={value}" for key, value in given.items() if value is not None]


@dataclass(frozen=True, eq=False)
class Replay:
    """A step as the run had it and as it is now."""

    config: Config  # of the replay
    start: int  # the checkpoint's step; 0 for the initial model
    world_size: int  # of the run
    logged: dict[str, float | None]  # by the names of COMPARED; empty where the run did not get to log the step
    replayed: dict[str, float]
    mask_logged: Tensor  # (B, T) bool
    mask_replayed: Tensor  # (B, T)

    @property
    def mask_iou(self) -> float:
        """Intersection over union of the two masks; 1 for two empty ones."""
        union = int((self.mask_logged | self.mask_replayed).sum())
        return int((self.mask_logged & self.mask_replayed).sum()) / union if union else 1.0

    @property
    def same(self) -> bool:
        """Whether masks and numbers are the run's, bit for bit."""
        return torch.equal(self.mask_logged, self.mask_replayed) and all(
            self.replayed[name] == value for name, value in self.logged.items() if value is not None
        )


def replay(run: Path, step: int, device: torch.device, settings: Settings = Settings()) -> Replay:
    """Raises UserError, before any weight is loaded, where the step cannot be replayed."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    if distributed.world_size() > 1:
        raise UserError("aipo.replay runs on one process: start it with python")
    steps = recorded_steps(run)

    @functools.cache  # all of a checkpoint is read to see whether it is as it was written
    def intact(number: int) -> bool:
        return damage(run / "checkpoints" / f"step-{number:06d}") is None

    if step not in steps:
        raise UserError(f"step {step} of {run} was not kept: {_can_be(run, steps, intact, whole=True)}")
    shares = read_batch(run, step)
    world = shares[0]["world_size"]
    config = load_config(str(run / "config.yaml"))
    sharded_run = config.sharding.zero_stage > 0
    # another number of shards, or another dtype, than DeepSpeed wrote is not what it reads
    plain = not sharded_run or settings.zero == 0 or world > 1 or settings.dtype not in (None, config.model.dtype)
    whole = not (plain and sharded_run)  # else weights alone can be put together, without the moments of AdamW
    start = _start(run, step, steps, intact, whole=whole)
    if start is None:
        raise UserError(
            f"step {step} of {run} cannot be replayed on these settings: {_can_be(run, steps, intact, whole=whole)}"
        )
    if start and not whole and config.optim.updates_per_batch > 1:
        raise UserError(
            f"step {step} of {run} cannot be replayed on these settings: the second of optim.updates_per_batch needs "
            "AdamW's moments, which are not put together from DeepSpeed's shards"
        )
    inputs = check_inputs(config, world)
    checkpoint = run / "checkpoints" / f"step-{start:06d}" if start else None
    if checkpoint:
        saved = json.loads((checkpoint / "identity.json").read_text())
        may_go_on(saved, inputs.identity, wanted=f"replay of {run}")
    never = ["guards.max_bad_steps=1000000"]  # a step gone bad is looked at, not the end
    config = load_config(
        str(run / "config.yaml"), [*settings.overrides(), *never, *(["sharding.zero_stage=0"] if plain else [])]
    )
    problems = {problem.id: problem for problem in inputs.problems}
    batches = [read_batch(run, number) for number in range(start + 1, step)] + [shares]

    policy = make_policy(config, inputs.model_path)
    with tempfile.TemporaryDirectory() as nowhere:  # where the trainer puts a batch gone bad
        trainer = Trainer(
            config,
            problems=inputs.problems,
            held_out=[],
            # nothing is drawn, judged, validated or saved
            collector=Collector(None, inputs.prompter, None, seed=config.seed),  # type: ignore[arg-type]
            passes=Passes(config, shard(policy, config, device), inputs.prompter, device, inputs.problems),
            reference=frozen_reference(config, inputs.model_path, device) if config.loss.kl_beta > 0 else None,
            selector=TokenSelector(config),
            curriculum=None,  # type: ignore[arg-type]
            store=None,  # type: ignore[arg-type]
            tracker=Tracker(Path(nowhere), active=False),
            progress=None,  # type: ignore[arg-type]
            identity={},
            engine_gap=lambda: 0.0,
        )
        if config.mi.gold_refresh == "never" and trainer.selector.uses_gold:  # the weights are still the initial ones
            trainer.passes.keep_golds(inputs.problems)
        if checkpoint:
            _load(trainer.sharded, checkpoint)
            state = torch.load(checkpoint / "rank-0.pt", map_location="cpu", weights_only=True)
            trainer.selector.load_state_dict(state["selector"])  # the same on every rank
        for trainer.step, batch in enumerate(batches, start=start):
            rollouts, mask, kappa = rebuild(batch, problems, updates=config.optim.updates_per_batch)
            assign(rollouts, config.advantage, truncated=config.loss.truncated)
            clock = Clock()
            selection, sums = trainer.update(rollouts, kappa, clock)
        trainer.generation.close()
    replayed = reduce_metrics(rollouts, sums, clock.seconds)
    logged: dict[str, Any] = next((line for line in read_jsonl(run / "metrics.jsonl") if line["step"] == step), {})
    return Replay(
        config,
        start,
        world,
        {name: logged[name] for name in COMPARED if name in logged and name in replayed},
        {name: replayed[name] for name in COMPARED if name in replayed},
        mask,
        selection.mask,
    )


def _load(sharded: Sharded, checkpoint: Path) -> None:
    """Weights and optimizer as they were saved; of DeepSpeed's shards into a plain policy the float32 weights alone."""
    if isinstance(sharded, Plain) and not (checkpoint / "plain.pt").exists():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        sharded.policy.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="deepspeed"))
    else:
        sharded.load(checkpoint)


def _start(run: Path, step: int, steps: set[int], intact: Callable[[int], bool], *, whole: bool) -> int | None:
    """The step whose weights a replay of ``step`` begins with, or None where a batch between the two is not there.

    Args:
        steps: whose batches are there.
        intact: whether the checkpoint of a step can be read.
        whole: whether an optimizer step can be made from a checkpoint, so that steps may lie between.
    """
    saved = sorted((step_of(path) for path in (run / "checkpoints").glob("step-*")), reverse=True)
    before = next((number for number in saved if number < step and intact(number)), 0)
    between = range(before + 1, step)
    return before if steps.issuperset(between) and (whole or not before or not between) else None


def _can_be(run: Path, steps: set[int], intact: Callable[[int], bool], *, whole: bool) -> str:
    """For an error: which steps can be."""
    found = sorted(step for step in steps if _start(run, step, steps, intact, whole=whole) is not None)
    if not found:
        return "none can be (tracking.replay=false, or no checkpoint before what is kept)"
    spans: list[list[int]] = []
    for step in found:
        if spans and spans[-1][-1] == step - 1:
            spans[-1][1:] = [step]
        else:
            spans.append([step])
    return f"those that can be are {', '.join('-'.join(map(str, span)) for span in spans)}"


def render(found: Replay) -> Table:
    """Logged, replayed, difference."""
    table = Table()
    for column in ("", "logged", "replayed", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in found.replayed.items():
        was = found.logged.get(name)
        table.add_row(
            name, "-" if was is None else f"{was:.8g}", f"{value:.8g}", "-" if was is None else f"{value - was:.2g}"
        )
    was, now = int(found.mask_logged.sum()), int(found.mask_replayed.sum())
    table.add_row("selected tokens", str(was), str(now), str(now - was))
    table.add_row("mask IoU", "", f"{found.mask_iou:.6g}", f"{found.mask_iou - 1:.2g}")
    return table


def describe(found: Replay, step: int) -> str:
    """One line on what was run."""
    config, start = found.config, found.start
    weights = f"the checkpoint of step {start}" if start else "the initial model"
    between = f" through steps {start + 1} to {step - 1}" if step - start > 2 else ""
    between = f" through step {start + 1}" if step - start == 2 else between
    stage = f"ZeRO {config.sharding.zero_stage}" if config.sharding.zero_stage else "without DeepSpeed"
    ranks = f"; the run had {found.world_size} processes" if found.world_size > 1 else ""
    return (
        f"step {step} from {weights}{between}: one process, {config.model.dtype}, {stage}, micro-batches of "
        f"{config.optim.micro_tokens} tokens{ranks}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m aipo.replay",
        description="Run the update of one step again and compare it with the log (docs/run-folder.md).",
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--step", type=int, required=True, help="as in metrics.jsonl: the first is 1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="in the place of the run's model.dtype")
    parser.add_argument("--micro-tokens", type=int, help="in the place of the run's optim.micro_tokens")
    parser.add_argument("--zero", type=int, choices=(0,), help="0: without DeepSpeed, float32 weights and autocast")
    given = parser.parse_args()

    def work(device: torch.device) -> int:
        found = replay(given.run, given.step, device, Settings(given.dtype, given.micro_tokens, given.zero))
        console = Console()
        console.print(describe(found, given.step), soft_wrap=True)
        console.print(render(found))
        if not found.logged:
            console.print("the run ended before it logged this step")
        elif found.same:
            console.print("bit for bit what the run logged")
        return 0

    settle()
    return distributed.launch(work)


if __name__ == "__main__":
    sys.exit(main())
