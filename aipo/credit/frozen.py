"""A frozen policy beside the engine that draws from it, in one process, for measurements."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from aipo import distributed
from aipo.config import Config, load_config
from aipo.errors import UserError
from aipo.inputs import Inputs
from aipo.model.export import find_model
from aipo.policy import make_policy
from aipo.reward import Rewarder
from aipo.rollout import engine_options, make_engine
from aipo.rollout.collect import Collector
from aipo.sharding import Sharded, shard

FIXED = ["sharding.zero_stage=0", "optim.share_prompts=false", "curriculum.enabled=false", "loss.kl_beta=0"]
FIXED += ["rollout.mode=colocate"]
"""Keys of a config that measuring settles: nothing is sharded, every sequence has a row of its own, one process."""


def command(name: str, text: str | None, config: str) -> argparse.ArgumentParser:
    """A parser of the arguments that every such measurement has."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help=config)
    parser.add_argument("--model", help="another model than the config's: hub id, folder, or a run of ours")
    parser.add_argument("--out", help="folder (default: in runs/credit, named after the config)")
    parser.add_argument("--signals", default="", help="by comma (default: all)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser


def asked_signals(options: argparse.Namespace) -> list[str]:
    """Names of ``--signals``; none are all."""
    return [name for name in options.signals.split(",") if name]


def configured(options: argparse.Namespace) -> Config:
    """The config that such arguments ask for."""
    model = [f"model.path={find_model(options.model).path}"] if options.model else []
    return load_config(options.config, [*FIXED, *model, *options.overrides])


def prepare(folder: Path, inputs: Inputs, **facts: Any) -> None:
    """Make the folder, whose values are gone on from.

    UserError if other settings, data or weights made them, or under a launcher.
    """
    if distributed.world_size() > 1:
        raise UserError("measurements of a frozen model are one process: start them without a launcher")
    asked = inputs.identity | json.loads(json.dumps(facts))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.is_file():
        made = json.loads(path.read_text())
        if other := sorted(key for key in asked.keys() | made.keys() if asked.get(key) != made.get(key)):
            raise UserError(
                f"{folder} holds values that other settings made ({', '.join(other)}): give another --out, or remove it"
            )
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asked, indent=1))
    temporary.replace(path)


def build(config: Config, inputs: Inputs, device: torch.device) -> tuple[Collector, Sharded]:
    options = engine_options(config, inputs.prompter.end_ids, device)
    engine = make_engine(config.rollout.engine, inputs.model_path, seed=config.seed, **options)
    rewarder = Rewarder(config.rewards(), max_tokens=config.rollout.max_tokens, thinking=config.data.thinking)
    sharded = shard(make_policy(config, inputs.model_path), config, device)
    return Collector(engine, inputs.prompter, rewarder, seed=config.seed), sharded
