"""What a campaign is: a base config, what differs by condition, seeds, what is read from each run, and what is shown.

``load_campaign`` reads a YAML file into it and checks everything that needs no data: a typo names key and file.
"""

from __future__ import annotations

import difflib
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from aipo.config import CONFIG_FOLDER, Config, load_config
from aipo.config.base import NonNegative, Positive, Section
from aipo.config.reading import flatten_sections, layers
from aipo.errors import UserError
from aipo.evaluation.benchmarks import ALIASES, EMBEDDED, PAPER
from aipo.evaluation.options import parse as parse_evaluation
from aipo.problems.sources import path_of
from aipo.record.checkpoints import flatten

Read = Literal["first", "last", "best"]
FIGURES = {
    "accuracy": "accuracy, %",
    "before": "before, %",
    "mag": "MAG (%)",
    "otf": "OTF (%)",
    "tes": "TES",
    "cost_share": "cost share, %",
    "best_step": "step of the best",
    "length": "completion, tokens",
    "steps": "steps",
    "tokens": "generated tokens",
    "seconds": "s/step",
    "minutes": "minutes a run",
    "memory": "peak GiB",
}
"""What is known of every run, and its heading; ``accuracy`` is the metric that conditions are compared by"""
OURS = (
    "config", "model", "benchmarks", "samples", "limit", "seed", "engine", "gpus", "out", "compare", "intervene",
    "tokens_from",
)  # fmt: skip
"""Options of evaluate.py that are the campaign's to set, or leave no results where it looks for them"""
LOWER_IS_BETTER = ("otf", "cost_share", "best_step", "tokens", "seconds", "minutes", "memory", "steps")


class Evaluation(Section):
    benchmarks: tuple[str, ...] = Field(min_length=1)
    """names of evaluate.py, embedded, or JSONL files; each is a column"""
    samples: Positive = 32
    """a problem: k of avg@k"""
    limit: Positive | None = None
    """only the first so many problems of each"""
    engine: Literal["vllm", "hf"] = "vllm"
    """what generates"""
    options: tuple[str, ...] = ()
    """more of evaluate.py, word by word, such as ["--temperature", "1.0"]"""
    tokens_from_run: bool = False
    """interventions take the tokens of highest mean MI in the run itself, not the paper's words"""

    @property
    def files(self) -> list[str]:
        return [name for name in self.benchmarks if name.endswith(".jsonl")]

    @property
    def fetched(self) -> dict[str, str]:
        """The named benchmarks with their files, which can be had where they are not there."""
        named = [ALIASES.get(name, name) for name in self.benchmarks if name not in (*self.files, EMBEDDED)]
        return {name: str(path_of(name)) for name in named}

    @property
    def names(self) -> list[str]:
        """Of the benchmarks, in results and as columns."""
        return [Path(name).stem if name in self.files else ALIASES.get(name, name) for name in self.benchmarks]

    def arguments(self, *, config: str, model: str | None, out: str, seed: int, intervene: str, run: str) -> list[str]:
        """Of evaluate.py, without ``options``. ``run`` is where tokens are taken from."""
        made = ["--config", config, *(["--model", model] if model else [])]
        made += ["--benchmarks", ",".join(self.benchmarks), f"--avg={self.samples}", "--seed", str(seed)]
        made += ["--engine", self.engine, "--out", out, *(["--limit", str(self.limit)] if self.limit else [])]
        if intervene != "none":
            made += ["--intervene", intervene, *(["--tokens-from", run] if self.tokens_from_run else [])]
        return made


class Condition(Section):
    method: str | None = None
    """configs/methods/NAME.yaml on top of the config"""
    config: str | None = None
    """another base than the campaign's"""
    read: Read | Positive | None = None
    """another moment than the campaign's: first is the model before training"""
    intervene: Literal["none", "drop", "force"] = "none"
    """high-MI tokens in the evaluation: forbidden or forced"""
    keys: dict[str, Any] = Field(default_factory=dict)
    """of the config, dotted; all other keys of a condition go here"""

    def over(self, other: Condition) -> Condition:
        """This one's settings where it has any, else the other's."""
        sides = [each.model_dump(exclude={"keys"}, exclude_unset=True) for each in (other, self)]
        return Condition(**(sides[0] | sides[1]), keys=other.keys | self.keys)


class Plot(Section):
    kind: Literal["curves", "forest", "bars", "heatmap"]
    """learning curves with bands; differences from the control; a bar a condition; a map over a pair of cut-points"""
    metric: str = "validation/accuracy"
    """of curves: any name in metrics.jsonl"""
    x: Literal["step", "tokens"] = "step"
    """of curves: training step, or tokens generated so far"""
    key: str | None = None
    """of heatmap: the key that holds two numbers"""


class Campaign(Section):
    title: str = ""
    """of the report"""
    scale: Literal["laptop", "paper", "own"] = "own"
    """said in the report; at paper scale the printed figures stand beside ours"""
    base: str
    """config that all runs start from"""
    common: Condition = Condition()
    """what all conditions share, on top of base and method"""
    panels: dict[str, Condition] = Field(default_factory=dict)
    """parts of the table, each with all conditions, such as backbones"""
    conditions: dict[str, Condition] = Field(default_factory=dict)
    """what is compared: name -> method, keys of the config, ..."""
    grid: dict[str, dict[str, Condition]] = Field(default_factory=dict)
    """axes that are crossed with each other and with conditions: key -> values, or name -> {name: keys}"""
    seeds: tuple[NonNegative, ...] = (0, 1, 2)
    """a run of each condition for each; a number n means 0 .. n - 1"""
    metric: str = "validation/accuracy"
    """name in metrics.jsonl that conditions are compared by; with evaluate it is the mean over benchmarks"""
    read: Read | Positive = "last"
    """when: before training, at the end, at its best, or at a step"""
    control: str | None = None
    """condition that the others are compared with"""
    evaluate: Evaluation | None = None
    """score the model of each run with evaluate.py"""
    columns: dict[str, str] = Field(default_factory=lambda: {"accuracy": ""})
    """of the table: what is read -> heading; a list takes the usual headings"""
    label: str = "method"
    """heading of the conditions"""
    printed: dict[str, dict[str, tuple[float | None, ...]]] = Field(default_factory=dict)
    """the paper's figures: panel -> condition -> one for each column"""
    plots: tuple[Plot, ...] = (Plot(kind="curves"), Plot(kind="forest"))
    """a kind, or a mapping with its settings"""
    gpus: Positive = 1
    """of one run: as many processes; on a machine without GPUs a run is one process"""
    hours: Positive = 24
    """time limit of a Slurm job; what is not done then goes on when the campaign is submitted again"""
    retries: NonNegative = 1
    """times a failed run is started again, from its newest checkpoint"""
    keep_models: bool = False
    """keep the trained model of each run; without, only what is evaluated is kept, until it is"""

    @field_validator("common", mode="before")
    @classmethod
    def _common(cls, value: Any) -> Any:
        return _condition(value)

    @field_validator("panels", "conditions", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("must be names with keys: {all: {mask.rule: all}, ...}")
        return {str(name): _condition(keys) for name, keys in value.items()}

    @field_validator("grid", mode="before")
    @classmethod
    def _axes(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("must be keys with lists of values: {mask.kappa_start: [0.1, 0.2]}")
        axes: dict[str, dict[str, Any]] = {}
        for axis, values in value.items():
            if values in ([], {}):
                raise ValueError(f"{axis} has no values")
            if isinstance(values, list):
                name = str(axis).rpartition(".")[2]
                axes[axis] = {f"{name}={_text(each)}": _condition({axis: each}) for each in values}
            elif isinstance(values, dict):
                axes[axis] = {str(name): _condition(keys) for name, keys in values.items()}
            else:
                raise ValueError(f"{axis} must be a list of values, or names with keys")
        return axes

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, value: Any) -> Any:
        return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("columns", mode="before")
    @classmethod
    def _columns(cls, value: Any) -> Any:
        return dict.fromkeys(value, "") if isinstance(value, list) else value

    @field_validator("plots", mode="before")
    @classmethod
    def _plots(cls, value: Any) -> Any:
        plots = [value] if isinstance(value, str | dict) else value or ()  # one alone
        return [{"kind": plot} if isinstance(plot, str) else plot for plot in plots]

    @model_validator(mode="after")
    def _fits(self) -> Campaign:
        names = list(self.variants())
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be distinct, at least one; got {list(self.seeds)}")
        if self.control is not None and self.control not in names:
            raise ValueError(f"control: {self.control} is no condition{_near(self.control, names)}")
        for name in self.evaluate.benchmarks if self.evaluate else ():
            known = [*PAPER, *ALIASES, EMBEDDED]
            if name not in known and not name.endswith(".jsonl"):
                raise ValueError(f"evaluate: benchmarks: {name} is no JSONL file and unknown{_near(name, known)}")
        scored = self.evaluate.names if self.evaluate else []
        if twice := [name for name in scored if scored.count(name) > 1]:
            raise ValueError(f"evaluate: benchmarks: {twice[0]} is named twice: leave one out, or rename a file")
        known = [*FIGURES, *scored]
        for name in self.columns:
            if name not in known and "/" not in name:
                raise ValueError(f"columns: {name} is unknown{_near(name, known)}; others are names in metrics.jsonl")
        for panel, rows in self.printed.items():
            if panel not in (list(self.panels) or [""]):
                raise ValueError(f"printed: {panel} is no panel{_near(panel, list(self.panels))}")
            for name, figures in rows.items():
                if name not in names:
                    raise ValueError(f"printed: {name} is no condition{_near(name, names)}")
                if len(figures) != len(self.columns):
                    raise ValueError(f"printed: {name} has {len(figures)} figures for {len(self.columns)} columns")
        for plot in self.plots:
            if plot.kind == "forest" and self.control is None and len(names) > 1 and "plots" in self.model_fields_set:
                raise ValueError("plots: forest shows differences from control: name one")
        return self

    def variants(self) -> dict[str, Condition]:
        """Conditions crossed with the axes of the grid, by name."""
        axes = [axis.items() for axis in self.grid.values()]
        made = {}
        for name, condition in (self.conditions or {"": Condition()}).items():
            for combination in itertools.product(*axes):
                parts = [part for part in (name, *(value for value, _ in combination)) if part]
                variant = condition
                for _, own in combination:
                    variant = own.over(variant)
                made[", ".join(parts) or "base"] = variant
        return made

    def heading(self, column: str) -> str:
        return self.columns[column] or FIGURES.get(column, column)


@dataclass(frozen=True)
class Setting:
    """One condition in one panel with one seed: what a run is asked to be, before it has a name on disk."""

    panel: str
    condition: str
    seed: int
    read: Read | int
    intervene: str
    config: Config


def load_campaign(path: Path) -> Campaign:
    """Read a campaign. Its ``from:`` names another one, beside it, whose keys hold where it says nothing.

    Raises UserError with the key and the file that is wrong.
    """
    path = find_campaign(path)
    tree = {k: v for _, content in layers(path, key="from", elsewhere=_elsewhere) for k, v in content.items()}
    known = Campaign.model_fields
    for key in tree:
        if key not in known:
            raise UserError(
                f"{path}: unknown key {key}{_near(str(key), list(known))} (there: from, {', '.join(known)})"
            )
    try:
        return Campaign.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_explain(each, path) for each in error.errors())) from None


def settings(campaign: Campaign, path: Path) -> Iterator[Setting]:
    """All runs of a campaign, panel by panel, seed by seed in each condition. UserError for a config that is wrong."""
    for panel, part in (campaign.panels or {"": Condition()}).items():
        for name, condition in campaign.variants().items():
            whole = condition.over(part).over(campaign.common)
            for seed in campaign.seeds:
                try:
                    config = _config(campaign, whole, seed)
                    _check(campaign, whole, config)
                except UserError as error:
                    where = ": ".join(part for part in (panel, name) if part)
                    raise UserError(f"{path}: {where}: {error}") from None
                yield Setting(panel, name, seed, whole.read or campaign.read, whole.intervene, config)


def _check(campaign: Campaign, condition: Condition, config: Config) -> None:
    """UserError for what cannot be run, evaluated, read or drawn of a condition with all that is common to it."""
    read, steps, every = condition.read or campaign.read, config.optim.steps, config.validation.every
    config.check_world_size(campaign.gpus)
    if campaign.evaluate is not None:
        _check_evaluation(campaign.evaluate, read, condition.intervene)
    elif condition.intervene != "none":
        raise UserError("intervene is of an evaluation: say evaluate: {benchmarks: [...]}")
    seldom = campaign.metric.startswith("validation/") and isinstance(read, int) and read % every and read != steps
    if isinstance(read, int) and (seldom or read > steps):
        raise UserError(f"read: {read} is not measured: of {steps} steps every {every}th and the last are validated")
    for key in (plot.key or "" for plot in campaign.plots if plot.kind == "heatmap"):
        flat = flatten(config.model_dump(mode="json"))
        match flat.get(key):
            case [int() | float(), int() | float()]:
                continue
        raise UserError(f"plots: heatmap: {key or 'none'} is no key with two numbers{_near(key, list(flat))}")


def _check_evaluation(asked: Evaluation, read: Read | int, intervene: str) -> None:
    """UserError for what evaluate.py would refuse, and for options that move its results or lose against ours."""
    if isinstance(read, int):
        raise UserError(f"read: {read} with evaluate: say first, last or best")
    if intervene != "none" and asked.tokens_from_run and read == "first":
        raise UserError("tokens_from_run with read: first has no run to take them from")
    ours = asked.arguments(config="CONFIG", model="MODEL", out="OUT", seed=0, intervene=intervene, run="RUN")
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            own, given = parse_evaluation(ours), parse_evaluation([*ours, *asked.options])
    except SystemExit as end:
        why = said.getvalue().strip().rpartition("error: ")[2] if end.code else "--help evaluates nothing"
        raise UserError(f"evaluate: options: {why}") from None
    for name in OURS:
        if getattr(own, name) != getattr(given, name):
            option = {"samples": "avg"}.get(name, name).replace("_", "-")
            raise UserError(f"evaluate: options: --{option} is the campaign's to set")


def _config(campaign: Campaign, condition: Condition, seed: int) -> Config:
    values = condition.keys | {"seed": seed}
    # as they are written: escaped, a sign such as an emoji is two that YAML takes for none; str is for dates
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in values.items()]
    return load_config(condition.config or campaign.base, overrides, method=condition.method)


def find_campaign(path: Path) -> Path:
    """As given, or under configs/campaigns."""
    for candidate in (path, CONFIG_FOLDER / "campaigns" / path):
        if candidate.is_file():
            return candidate
    folder = CONFIG_FOLDER / "campaigns"
    known = sorted(str(each.relative_to(folder)) for each in folder.rglob("*.yaml"))
    raise UserError(f"campaign {path} not found{_near(str(path), known)} (in configs/campaigns: {', '.join(known)})")


def _elsewhere(name: str, asked_by: str) -> Path:
    raise UserError(f"{asked_by}{name} is not beside it")


def _condition(value: Any) -> Any:
    """Sections of a config become dotted keys, apart from the condition's own."""
    if isinstance(value, Condition):
        return value
    if value is None:
        return Condition()
    if not isinstance(value, dict):
        raise ValueError(f"keys of a config are meant, got {value!r}")
    own = {key: each for key, each in value.items() if key in Condition.model_fields and key != "keys"}
    rest = {key: each for key, each in value.items() if key not in own}
    if taken := sorted({"name", "runs", "seed"} & rest.keys()):
        raise ValueError(f"{taken[0]} is the campaign's to set, for each run" + (": see seeds" * (taken[0] == "seed")))
    return own | {"keys": dict(flatten_sections(rest))}


def _text(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


def _explain(error: Any, path: Path) -> str:
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{path}: {key} is required"
    if error["type"] == "value_error":
        return f"{path}: {key}: {message}" if key and not message.startswith(key) else f"{path}: {message}"
    return f"{path}: {key}: {message[0].lower()}{message[1:]}, got {error['input']!r}"
