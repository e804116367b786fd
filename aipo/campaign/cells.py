"""From a campaign to cells, and from cells to jobs: what is to be computed, each once, and where it lies.

A cell is one condition, panel and seed. Its run lies in ``RUNS/cells/KEY``, where the key stands for the resolved
config, the data, the model and the code, so that equal cells of any campaigns are one run.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from aipo.campaign.jobs import ROOT, SCRIPTS, Job, State, What, Work, source_version
from aipo.campaign.schema import Campaign, Setting, find_campaign, load_campaign, settings
from aipo.config import Config, dump_config
from aipo.errors import UserError
from aipo.inputs import MAY_CHANGE, data_sets, file_digest
from aipo.labelling import DEPENDS_ON
from aipo.model.loading import weights_digest
from aipo.problems.readers import HUB
from aipo.problems.sources import ensure
from aipo.record.checkpoints import digest, flatten, run_identity, write_atomically
from aipo.record.tracker import versions

planned_source = functools.cache(source_version)  # what keys stand for; each command looks whether it is still so
packages = functools.cache(versions)
ELSEWHERE = ("embedded:", HUB)
READ_BY_EVALUATION = (
    "data.system",
    "data.examples",
    "data.suffix",
    "data.thinking",
    "model.path",
    "rollout.max_tokens",
)
FREE = [key for key in MAY_CHANGE if not key.startswith("validation.")]  # what is watched must be there to be read


@dataclass(frozen=True)
class Cell:
    """``folder`` is the run's; ``results`` what evaluate.py writes, None where a metric of training is read."""

    setting: Setting
    key: str
    twins: str  # the same for all seeds
    backbone: str  # the same for cells whose model, evaluated before training, gives the same figures
    folder: Path
    results: Path | None
    labels: str | None  # the same for cells that share a labelling pass; None without a curriculum

    @property
    def name(self) -> str:
        parts = (self.setting.panel, self.setting.condition, f"seed {self.setting.seed}")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Plan:
    """A campaign with its cells, in the order of its table, and the jobs that compute them, each once."""

    name: str
    campaign: Campaign
    cells: list[Cell]
    jobs: list[Job]
    folder: Path  # of tables and plots
    path: Path

    def job(self, cell: Cell) -> Job:
        return next(job for job in self.jobs if job.key == cell.key)

    def state(self, cell: Cell) -> State:
        """Of the cell alone: another condition may want more of the same run."""
        return "done" if (cell.results or cell.folder / "summary.json").is_file() else self.job(cell).state()


def make_plan(path: Path, runs: Path) -> Plan:
    """Read a campaign and everything that its keys depend on. UserError for what is wrong; nothing is written."""
    path = find_campaign(path)
    campaign = load_campaign(path)
    name = path.stem if campaign.scale == "own" else f"{campaign.scale}-{path.stem}"
    cells = [_cell(campaign, setting, runs.resolve()) for setting in settings(campaign, path)]
    by_key: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: campaign.seeds.index(cell.setting.seed)):  # all of a seed, then the next
        by_key.setdefault(cell.key, []).append(cell)
    jobs = [_job(campaign, name, same) for same in by_key.values()]
    return Plan(name, campaign, cells, jobs, runs.resolve() / "campaigns" / name, path.resolve())


def open_folder(plan: Plan) -> None:
    """Make the campaign's folder. UserError where it is that of another campaign of the same name."""
    noted = plan.folder / "campaign.txt"
    other = Path(noted.read_text().strip()) if noted.is_file() else plan.path
    if other != plan.path and other.is_file():
        raise UserError(f"{plan.folder} is of {other}, and {plan.path} has the same name: rename one of the two")
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(noted, f"{plan.path}\n")


def write_configs(plan: Plan) -> None:
    """The config of each run in its folder, where train.py and evaluate.py read it, and what is wanted of the run."""
    open_folder(plan)
    for job in plan.jobs:
        job.claim()
    for cell in {cell.key: cell for cell in plan.cells}.values():
        place = {"name": cell.folder.name, "runs": str(cell.folder.parent)}
        path, text = cell.folder / "cell.yaml", dump_config(cell.setting.config.model_copy(update=place))
        if not path.is_file() or path.read_text(encoding="utf-8") != text:  # what runs, or is done, is let alone
            write_atomically(path, text)


def _cell(campaign: Campaign, setting: Setting, runs: Path) -> Cell:
    config = setting.config
    facts = {
        "ranks": campaign.gpus,
        "data": {name: _content(source.path) for name, source in data_sets(config).items()},
        "model": _weights(config.model.path),
        "latents": config.branch.latent_path and _content(config.branch.latent_path),
        "rewards": {reward.function: _module(reward.function) for reward in config.rewards().values()},
        "code": planned_source("training"),
        "packages": packages(),
    }
    identity = run_identity(config.model_dump(), may_change=FREE, **facts)
    shared = {key: value for key, value in identity.items() if key.startswith((*DEPENDS_ON, *facts))}
    labels = digest(shared) if config.curriculum.enabled else None
    # of the model as it is nothing of the config matters but what evaluate.py reads
    asked = (*READ_BY_EVALUATION, "seed", "model", "ranks", "code", "packages")
    before = {key: identity[key] for key in asked}
    untrained = setting.read == "first" and campaign.evaluate is not None
    identity = before if untrained else identity
    key, twins = digest(identity), digest(identity | {"seed": None})
    folder = runs / "cells" / (f"untrained-{key}" if untrained else key)
    results = None
    if campaign.evaluate is not None:
        files = [_content(path) for path in (*campaign.evaluate.files, *campaign.evaluate.fetched.values())]
        asked_for = digest([campaign.evaluate.model_dump(), files, planned_source("evaluation")])
        of = f"{setting.read}-{asked_for[:8]}"
        results = folder / "evaluations" / of
        results = results / ("results.json" if setting.intervene == "none" else f"{setting.intervene}/results.json")
    return Cell(setting, key, twins, digest(before), folder, results, labels)


def _job(campaign: Campaign, name: str, cells: Sequence[Cell]) -> Job:
    """All that is computed in one folder: the training, then what each condition evaluates of it."""
    first = cells[0]
    work, trained = [], not (first.setting.read == "first" and campaign.evaluate)
    if trained:
        arguments = ["--config", str(first.folder / "cell.yaml"), "--resume", "auto"]
        work.append(_work("training", campaign, arguments, first.folder / "summary.json"))
    for results, cell in {cell.results: cell for cell in cells if cell.results}.items():
        work.append(_work("evaluation", campaign, _evaluate(campaign, cell, trained), results))
    tags = sorted({tag for cell in cells for tag in (cell.setting.condition, cell.setting.panel) if tag})
    config = first.setting.config
    return Job(
        key=first.key,
        name="; ".join(dict.fromkeys(cell.name for cell in cells)),
        folder=str(first.folder),
        work=tuple(work),
        environment={
            "WANDB_RUN_GROUP": name,
            "WANDB_TAGS": ",".join([*(tag.replace(",", " ")[:64] for tag in tags), f"seed {first.setting.seed}"]),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1700",  # s: a launcher of several ranks waits so long for them to save
        },
        gpus=campaign.gpus,
        retries=campaign.retries,
        steps=config.optim.steps if trained else 0,
        keep_model=campaign.keep_models,
        tokens=config.optim.generated_tokens,
        facts={"twins": first.twins, "device": device(), **size(config, campaign.gpus)},
    )


def _work(what: What, campaign: Campaign, arguments: Sequence[str], result: Path) -> Work:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={campaign.gpus}"]
    command = [sys.executable, *(several if campaign.gpus > 1 else []), str(ROOT / SCRIPTS[what]), *arguments]
    return Work(what, tuple(command), str(result), planned_source(what))


def _evaluate(campaign: Campaign, cell: Cell, trained: bool) -> list[str]:
    asked, setting, folder = campaign.evaluate, cell.setting, cell.folder
    assert asked is not None
    assert cell.results is not None
    model = folder / "checkpoints" / "best" if setting.read == "best" else folder
    out = cell.results.parent if setting.intervene == "none" else cell.results.parent.parent
    ours = asked.arguments(
        config=str(folder / "cell.yaml"),
        model=str(model) if trained else None,
        out=str(out),
        seed=setting.seed,
        intervene=setting.intervene,
        run=str(folder),
    )
    return [*asked.options, *ours]  # of two of a kind the last holds


def size(config: Config, gpus: int) -> dict[str, Any]:
    """What the time of a run goes by: model, engine, and completion tokens at most."""
    rollouts = config.optim.steps * config.rollout.questions_per_step * config.rollout.samples_per_question
    work = rollouts * config.rollout.max_tokens
    return {"model": config.model.path, "engine": config.rollout.engine, "gpus": gpus, "work": work}


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@functools.cache
def _content(path: str) -> str:
    """A file or folder by what is in it; what is made from the code, or lies on the hub, by its name."""
    if path.startswith(ELSEWHERE):
        return path
    place = Path(path).expanduser()
    if place.is_dir():
        files = (file for file in sorted(place.rglob("*")) if file.is_file())
        return digest({str(file.relative_to(place)): file_digest(str(file)) for file in files})
    return file_digest(str(place)) if place.is_file() else f"{path} is not there"


def _module(function: str) -> str:
    """The file of a reward function, by its content; the verifier has none. Nothing of it is imported."""
    origin: str | None = None
    path: Sequence[str] | None = None
    for name in itertools.accumulate(function.partition(":")[0].split("."), "{}.{}".format):
        spec = PathFinder.find_spec(name, path)
        origin, path = (spec.origin, spec.submodule_search_locations or []) if spec else (None, [])
    return file_digest(origin) if origin else f"{function} is not there"


@functools.cache
def _weights(name: str) -> str:
    folder = Path(name).expanduser()
    return weights_digest(str(folder), PretrainedConfig()) if folder.is_dir() else name


def missing_data(plan: Plan, *, offline: bool = True) -> list[str]:
    """Files that runs and evaluations read and that are not there; ``offline`` also what would be fetched."""
    paths = {source.path for cell in plan.cells for source in data_sets(cell.setting.config).values()}
    if asked := plan.campaign.evaluate:
        paths |= {*asked.files, *(asked.fetched.values() if offline else ())}
    return sorted(path for path in paths if not path.startswith(ELSEWHERE) and not Path(path).expanduser().exists())


def check_here(plan: Plan, *, offline: bool = False) -> None:
    """What must hold before anything is started, ``offline`` where nothing can be fetched later. UserError."""
    if missing := missing_data(plan, offline=offline):
        how = "make data, for a bed python -m aipo.beds, or put the file there"
        raise UserError(f"{plan.name}: {', '.join(missing)} not there: {how}")


def fetch_benchmarks(plan: Plan) -> bool:
    """Get the named benchmarks that are not there. Whether any was got: keys go by its questions, so plan again.

    Raises UserError where the hub gives none.
    """
    asked = plan.campaign.evaluate
    absent = [name for name, path in asked.fetched.items() if not Path(path).is_file()] if asked else []
    for name in absent:
        ensure(name)
    _content.cache_clear()
    return bool(absent)


def differences(plan: Plan) -> dict[str, dict[str, Any]]:
    """Cell key -> the config keys that are not the same in all cells, but for the seed."""
    flat = {cell.key: flatten(cell.setting.config.model_dump(mode="json")) for cell in plan.cells}
    pairs = itertools.pairwise(flat.values())
    varied = {k for a, b in pairs for k in a.keys() | b.keys() if a.get(k) != b.get(k)} - {"seed", "name"}
    return {key: {k: v for k, v in own.items() if k in varied} for key, own in flat.items()}
