"""Make a bed: its problems and its base policy:  python -m aipo.beds chain|fork|copy [--words 16] [--fixed 0.5] ...

They go to data/beds/NAME, where configs/beds/NAME.yaml reads them. Under two minutes on one core; a width of 128, four.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

from aipo.beds.worlds import WORLDS, Knobs
from aipo.errors import UserError

SIZES = {"train": 800, "held_out": 200}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m aipo.beds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world", choices=WORLDS)
    for field in fields(Knobs):
        kind = float if field.type == "float" else int
        about = f"{field.metadata['help']} (default: {knob_defaults(field.name)})"
        parser.add_argument(f"--{field.name}", type=kind, help=about)
    parser.add_argument("--name", help="folder in data/beds (default: the world)")
    parser.add_argument("--width", type=int, default=64, help="of the model: 64 is 0.2M parameters, 128 is 0.9M")
    steps = ", ".join(f"{name} {world.pretrain_steps}" for name, world in WORLDS.items())
    parser.add_argument("--pretrain-steps", type=int, help=f"of the pre-training (default: {steps})")
    parser.add_argument("--batch", type=int, default=128, help="demonstrations a pre-training step (default: 128)")
    parser.add_argument("--lr", type=float, default=3e-3, help="of the pre-training (default: 0.003)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and demonstrations (default: 0)")
    options = parser.parse_args(arguments)
    if options.pretrain_steps is None:
        options.pretrain_steps = WORLDS[options.world].pretrain_steps
    return options


def knob_defaults(name: str) -> str:
    return ", ".join(f"{world} {getattr(WORLDS[world].knobs, name)}" for world in WORLDS)


def turned(arguments: argparse.Namespace) -> Knobs:
    """The world's knobs with those that were given; UserError for one out of range."""
    given = {f.name: getattr(arguments, f.name) for f in fields(Knobs) if getattr(arguments, f.name) is not None}
    knobs = replace(WORLDS[arguments.world].knobs, **given)
    asked = vars(arguments) | asdict(knobs)
    for name in ("steps", "words", "pretrain_steps", "batch"):
        if asked[name] < 1:
            raise UserError(f"--{name.replace('_', '-')}: {asked[name]} is below 1")
    for name in ("fixed", "noise"):
        if not 0 <= getattr(knobs, name) <= 1:
            raise UserError(f"--{name}: {getattr(knobs, name)} is no share: take 0 to 1")
    if knobs.fillers < 0:
        raise UserError(f"--fillers: {knobs.fillers} is below 0")
    if arguments.width < 8 or arguments.width % 8:  # four heads of an even size
        raise UserError(f"--width: {arguments.width} is no multiple of 8")
    return knobs


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        make(options, turned(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(options: argparse.Namespace, knobs: Knobs) -> None:
    from aipo.beds import base_policy as base  # torch: seconds
    from aipo.model.loading import save_model

    world, start = replace(WORLDS[options.world], knobs=knobs), time.perf_counter()
    folder = Path("data/beds") / (options.name or options.world)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bed.json").unlink(missing_ok=True)  # written last: a bed that is there is whole
    held_out = base.problems(world, SIZES["held_out"], seed=2)
    asked = frozenset(" ".join(example.question) for example in held_out)
    train = base.problems(world, SIZES["train"], seed=1, without=asked)
    for name, examples in (("train", train), ("held_out", held_out)):
        lines = (json.dumps(example.row()) + "\n" for example in examples)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    tokenizer = base.word_tokenizer(knobs.vocabulary())
    model = base.small_llama(len(tokenizer), width=options.width, seed=options.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; filler entropy {math.log(knobs.words):.2f} nats")
    settings = {"batch": options.batch, "lr": options.lr, "seed": options.seed}
    base.pretrain(
        model, tokenizer, world, steps=options.pretrain_steps, say=lambda line: print(line, flush=True), **settings
    )
    right, seconds = base.accuracy(model, tokenizer, world, questions=2000), time.perf_counter() - start
    save_model(model, tokenizer, folder / "model")
    sigma = round(base.bandwidth(model, tokenizer, world), 1)
    made = {"world": options.world, **asdict(knobs), "width": options.width, "pretrain_steps": options.pretrain_steps}
    facts = made | settings | {"accuracy": right, "sigma": sigma}
    (folder / "bed.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{folder}: base policy right in {right:.1%} of 2000 samples, median bandwidth {sigma}, {seconds:.0f} s")
    if not 0.2 <= right <= 0.4:
        print("that is outside 20 to 40 %: more or fewer --pretrain-steps, or another --noise, move it")


if __name__ == "__main__":
    sys.exit(main())
