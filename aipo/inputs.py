"""What a run reads, and everything that can be wrong with it, before any weight is loaded."""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from aipo.branching.cvae import Latents, load_latents
from aipo.config import Config
from aipo.config.data import VERIFIER, Source, WatchSource
from aipo.errors import UserError
from aipo.evaluation.scoring import Watched
from aipo.model.loading import check_weights, read_folder, skeleton, weights_digest
from aipo.problems.datasets import EMBEDDED, Loaded, Problem, fingerprint, load_mix, load_problems
from aipo.problems.embedded import cache_folder, resolve_model
from aipo.problems.holdout import hold_out
from aipo.problems.prompts import Prompter, wrong_golds
from aipo.problems.readers import HUB
from aipo.record.checkpoints import compare_identity, run_identity
from aipo.rollout import require_engine
from aipo.verify import FunctionError, Verifier

# what may differ between a checkpoint and the run that goes on from it: nothing of it changes what is computed
MAY_CHANGE = (
    "name",
    "runs",
    "tracking",
    "checkpoint",
    "guards",
    "reward.workers",
    "validation.watch",
    "validation.watch_every",
    "validation.watch_samples",
    "rollout.check_sync",
    "rollout.check_every",
    "rollout.server_url",
    "rollout.server_timeout_s",
)
# and what a run is told to change that dynamic sampling ended: it mattered to no step that was made
MAY_MEND = ("dynamic.max_tries", "dynamic.on_exhausted")


@dataclass
class Inputs:
    """All that a run reads, checked, before any model is loaded."""

    model_path: str
    problems: list[Problem]
    held_out: list[Problem]
    watched: dict[str, Watched]  # by the name in the metrics
    prompter: Prompter
    notes: list[str]  # what was dropped, for the user
    identity: dict[str, Any]


def check_inputs(config: Config, world: int) -> Inputs:
    """Read and check model folder, tokenizer and data. Raises UserError; loads no weights."""
    config.check_world_size(world)
    path = resolve_model(config.model.path)
    loaded = load_data(config, data_sets(config))
    folder = read_folder(path, key="model.path", name=config.model.path)
    check_weights(path, key="model.path")
    check_model(config, folder.architecture)
    find_latents(config, path)
    data = config.data
    prompter = Prompter(
        folder.tokenizer,
        system=data.system,
        examples=data.examples,
        suffix=data.suffix,
        thinking=data.thinking,
        max_prompt_tokens=data.max_prompt_tokens,
        generation_config=folder.generation,
        suffixes={origin: each.suffix for origin, each in config.sources().items() if each.suffix is not None},
    )
    check_functions(config)
    notes: list[str] = []
    kept: dict[str, list[Problem]] = {"train": []}
    for name, (spec, content) in loaded.items():
        short, too_long = prompter.filter(content.problems)
        reasons = {**content.dropped, f"longer than {data.max_prompt_tokens} tokens": too_long}
        notes.append(f"{name}: {len(short)} questions from {spec}{dropped(reasons)}")
        purpose = "train" if name.startswith("train") else name  # of any source
        kept[purpose] = [*kept.get(purpose, []), *short]
    if data.validation is None:
        count, seed = config.validation.holdout, config.validation.holdout_seed
        kept["train"], kept["validation"], copies = hold_out(kept["train"], count, seed=seed)
        notes.append(
            f"validation: {len(kept['validation'])} of the training questions, held out; {len(kept['train'])} are left "
            f"to train on{dropped({'near-duplicates of these': copies})}"
        )
    if config.rollout.questions_per_step > len(kept["train"]):
        raise UserError(
            f"rollout.questions_per_step ({config.rollout.questions_per_step}) exceeds the {len(kept['train'])} "
            f"questions of data.train: lower it or add questions"
        )
    drawn = config.rollout.questions_per_step * config.dynamic.factor
    if config.dynamic.enabled and drawn > len(kept["train"]):
        raise UserError(
            f"dynamic.factor: {drawn} questions a draw exceed the {len(kept['train'])} of data.train: lower it, or "
            "rollout.questions_per_step"
        )
    if config.mi.gold_text == "solution":
        for problem in kept["train"]:
            prompter.encode_gold(problem, "solution")  # raises for one without
    if config.mask.score in ("critical", "filler"):
        for problem in kept["train"]:
            if not problem.critical:
                raise UserError(
                    f"mask.score: {config.mask.score}, and the row of question {problem.id!r} has no field 'critical', "
                    "the places of the tokens that decide its answer: add it, or take another score"
                )
    if config.mi.gold_control == "shuffled":
        wrong_golds(kept["train"], config.seed)
    # what is not installed comes last: it must not hide what is wrong with config and data
    require_engine(config.rollout.engine)
    if config.model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise UserError("model.attention: flash_attention_2 is not installed: pip install flash-attn, or use sdpa")
    check_compiler()
    held_out = kept["validation"][: config.validation.questions]
    watched = {
        each.called: Watched(
            kept[f"watch {each.called}"],
            samples=each.samples or config.validation.watch_samples,
            every=each.every or config.validation.watch_every,
        )
        for each in watch_sources(config)
    }
    identity = run_identity(
        config.model_dump(),
        may_change=MAY_CHANGE,
        world_size=world,
        train_fingerprint=fingerprint(kept["train"]),
        validation_fingerprint=fingerprint(held_out),
        **{"weights of model.path": weights_digest(path, folder.architecture)},
        **({"latents": file_digest(file)} if (file := latent_path(config)) else {}),
    )
    return Inputs(path, kept["train"], held_out, watched, prompter, notes, identity)


def load_data(config: Config, names: Collection[str]) -> dict[str, tuple[str, Loaded]]:
    """(path, problems) by some names of :func:`data_sets`, all sources of training or none. Raises UserError."""
    data = config.data
    given = dict(zip((f"watch {each.called}" for each in watch_sources(config)), config.validation.watch))
    mix = {} if isinstance(data.train, str) or not _training(names) else load_mix(data.train)
    sets: dict[str, tuple[str, Loaded]] = {}
    for name, source in ((name, source) for name, source in data_sets(config).items() if name in names):
        purpose, _, called = name.partition(" ")
        if purpose == "train":
            loaded = mix[called] if mix else load_problems(source.path, split="train")
        elif isinstance(given.get(name, data.validation), str):  # a path alone: its problems are as if of no source
            loaded = load_problems(source.path, split="validation")
        else:
            loaded = load_problems(source, split="validation", origin=name.replace(" ", "/"))
        sets[name] = source.path, loaded
    return sets


def _training(names: Collection[str]) -> set[str]:
    return {name for name in names if name.partition(" ")[0] == "train"}


def check_compiler() -> None:
    """UserError where a GPU's kernels could not be compiled."""
    if torch.cuda.is_available() and find_spec("triton") and (lacks := triton_lacks()):
        raise UserError(f"Triton compiles a GPU's kernels when they are first used, and finds {lacks}: install it")


def triton_lacks() -> str | None:
    """What Triton would not find to compile with, of what pip does not install."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler (gcc, clang, or the one that CC names)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "no Python.h (Debian's python3-dev)"
    return None


def data_sets(config: Config) -> dict[str, Source]:
    """Everything that a run reads, by what it is for: ``train`` or ``train NAME`` of each of several sources,
    ``validation``, ``watch NAME``."""
    train, validation = config.data.train, config.data.validation
    if isinstance(train, str):
        sets: dict[str, Source] = {"train": Source(path=train)}
    else:
        sets = {f"train {source.called}": source for source in train}
    if validation is not None:
        sets["validation"] = Source(path=validation) if isinstance(validation, str) else validation
    return sets | {f"watch {each.called}": each for each in watch_sources(config)}


def watch_sources(config: Config) -> list[WatchSource]:
    """The watched sets, those too that are given as a path alone."""
    return [WatchSource(path=each) if isinstance(each, str) else each for each in config.validation.watch]


def check_functions(config: Config) -> None:
    """Raises UserError for a reward function that cannot be imported where it will run."""
    reward = config.reward
    with Verifier(1, reward.timeout_s, reward.memory_mb) as verifier:
        for function in sorted({each.function for each in config.rewards().values()} - {VERIFIER}):
            try:
                verifier.check(function)
            except FunctionError as error:
                raise UserError(
                    f"reward.function: {function} cannot be imported ({error}): install its package, put its file "
                    "beside train.py or its folder on PYTHONPATH; reward.memory_mb caps what it may load"
                ) from error


def check_model(config: Config, architecture: Any) -> None:
    """What can be wrong between a config and the model's own."""
    skeleton(architecture, key="model.path", name=config.model.path)
    layers, context = architecture.num_hidden_layers, architecture.max_position_embeddings
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    if not -layers <= config.mi.layer < layers:
        raise UserError(f"mi.layer: {config.mi.layer} is not a layer of {config.model.path}, which has {layers}")
    by_attention = config.advantage.tokens == "attention" or (config.mask.score == "attention" and config.mask.ranks)
    if by_attention and not all(-layers <= i < layers for i in config.advantage.layers):
        raise UserError(f"advantage.layers: {list(config.advantage.layers)}: {config.model.path} has {layers} layers")
    if longest > context:
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_tokens ({longest}) exceed the {context} tokens that "
            f"{config.model.path} can read: lower one of them"
        )
    kinds = getattr(architecture, "layer_types", None) or getattr(architecture, "layers_block_type", None) or ()
    others = sorted({*kinds} - {"full_attention", "sliding_attention"})
    if others and (config.optim.share_prompts or config.optim.packing):
        raise UserError(
            f"optim.{'packing' if config.optim.packing else 'share_prompts'}: {config.model.path} has layers of kind "
            f"{', '.join(others)}, which would carry one sequence into the next: set it to false"
        )
    scalings = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    if changed := [key for key in scalings if getattr(architecture, key, None) not in (None, 1.0)]:
        raise UserError(f"{config.model.path} changes its logits after the head ({changed[0]}): not supported")


def dropped(reasons: dict[str, int]) -> str:
    """Counts of dropped questions as the end of a sentence; nothing where none was."""
    text = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons.items() if count)
    return f"; dropped {text}" if text else ""


def describe_data(config: Config) -> list[str]:
    """For --dry-run: how many questions there are, of what is there. Raises UserError for bad rows."""
    paths = {name: source.path for name, source in data_sets(config).items()}
    there = {name for name, path in paths.items() if _is_there(path)}
    if not _training(paths) <= there:  # sources are compared with each other
        there -= _training(paths)
    lines = [
        f"{_key(name)}: {len(loaded.problems)} questions from {path}{dropped(loaded.dropped)}"
        for name, (path, loaded) in load_data(config, there).items()
    ]
    if config.data.validation is None:
        lines.append(f"validation.holdout: {config.validation.holdout} questions of data.train, not trained on")
    return lines


def missing_data(config: Config) -> list[str]:
    """For --dry-run: which questions are not there yet."""
    paths = {name: source.path for name, source in data_sets(config).items()}
    return [
        f"{_key(name)}: {path} is fetched when the run starts"
        if path.startswith(HUB)
        else f"{_key(name)}: {path} is not there yet; before the run, put a JSONL file there"
        for name, path in paths.items()
        if not _is_there(path)
    ]


def _key(name: str) -> str:
    return f"validation.{name}" if name.startswith("watch ") else f"data.{name}"


def _is_there(path: str) -> bool:
    return path.startswith(EMBEDDED) or Path(path).expanduser().exists()


def without_effect(config: Config) -> list[str]:
    """For --dry-run: keys that were set and change nothing."""
    loss, reward, notes = config.loss, config.reward, []
    if reward.rule != "verifier" and reward.correctness < 1:
        notes = [f"note: reward.format and reward.length without effect: reward.rule: {reward.rule} rewards by itself"]
    about_ratio = ("clip_low", "clip_high", "ratio", "gate_positive", "gate_negative", "divergence")
    keys = [key for key in about_ratio if key in loss.model_fields_set]
    if config.optim.updates_per_batch > 1 or loss.old_policy == "engine" or not keys:
        return notes
    named = ", ".join(f"loss.{key}" for key in keys)
    return [
        *notes,
        f"note: {named} without effect: with optim.updates_per_batch: 1 the policy that is updated is the one that "
        "drew, so every importance ratio is 1 and nothing is clipped",
    ]


def file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def may_go_on(saved: dict[str, Any], current: dict[str, Any], *, wanted: str = "--resume") -> None:
    """Raise UserError naming what a checkpoint and the run that wants it differ in, but for what may be mended."""
    free = set(MAY_MEND) if saved.get("dynamic.on_exhausted") == "error" else set()
    free |= {"latents"} - current.keys()  # nothing is drawn with them
    compare_identity(*({k: v for k, v in each.items() if k not in free} for each in (saved, current)), wanted=wanted)


def check_cache() -> None:
    """Raise UserError if labels of the curriculum could not be kept."""
    folder = cache_folder() / "labels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}, where runs keep the labels of their questions, cannot be written ({error.strerror}): set "
            "AIPO_CACHE to a folder that can, or curriculum.enabled=false"
        ) from None


def latent_path(config: Config) -> str | None:
    """``branch.latent_path`` where something is drawn with it."""
    return config.branch.latent_path if config.branch.enabled and config.branch.latent != "none" else None


def find_latents(config: Config, path: str) -> Latents | None:
    file = latent_path(config)
    return None if file is None else load_latents(file, AutoConfig.from_pretrained(path))
