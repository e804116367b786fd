"""YAML -> one typed, validated, immutable tree.

A config file holds only what differs from its ``base:`` (looked up like the file itself: a name without a folder
is searched in ``configs/``). Dotted overrides (``optim.lr=2e-6``) are applied last. Every failure is a
:class:`UserError` that names the key, the file or override that set it, and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from aipo.errors import UserError

POSITION_ELEMENTS = 2**27  # float64 moments of mi.estimator: position, 1 GiB
CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads on, off, yes, no as booleans, and pydantic would take them for 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise PydanticCustomError("boolean", "input should not be a boolean")
        return value


class ModelConfig(Section):
    path: str
    """Hugging Face folder (such as runs/NAME/final), hub id, or embedded:smollm2-135m"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the forward and backward pass; optimizer masters are float32 either way"""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """attention implementation of transformers"""
    gradient_checkpointing: bool = True
    """recompute each layer in the backward pass: less memory, about a third more compute"""
    head_chunk: Positive = 1024
    """positions whose logits exist at one time"""


class DataConfig(Section):
    train: str
    """JSONL file with question and answer, or embedded:chain_sum"""
    validation: str
    """held-out problems, same forms as data.train"""
    system: str | None = None
    """system prompt"""
    examples: tuple[tuple[str, str], ...] = ()
    """worked (user, assistant) turns before the question"""
    suffix: str | None = None
    """text appended to every question"""
    thinking: bool = False
    """thinking mode of the chat template, where it has one"""
    max_prompt_tokens: Positive = 2048
    """longer questions are dropped and counted"""


class RolloutConfig(Section):
    engine: Literal["vllm", "hf"] = "vllm"
    """what generates"""
    questions_per_step: Positive = 128
    """over all ranks"""
    samples_per_question: Positive = 8
    """N, the group size"""
    max_tokens: Positive = 10240
    """longest completion"""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """of sampling; log-probabilities everywhere are after it"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """nucleus mass"""
    top_k: Annotated[int, Field(ge=-1)] = -1
    """-1 is off"""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """share of a GPU's memory that vLLM takes while it generates; handed back during the update"""
    kv_cache_gb: Annotated[float, Field(gt=0)] = 1.0
    """KV cache on a machine without a GPU"""
    importance_correction: Literal["none", "token_truncated", "sequence_mask"] = "token_truncated"
    """weight for the difference between vLLM's and our log-probabilities"""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """truncation of that weight"""
    check_sync: bool = True
    """at start-up, perturb and restore vLLM's weights and compare log-probabilities with ours"""


class RewardConfig(Section):
    correctness: Fraction = 1.0
    """weight of a right answer"""
    format: Fraction = 0.0
    """weight of a well-formed answer"""
    length: Fraction = 0.0
    """weight of DAPO's soft overlong shaping, rescaled to 0..1"""
    overlong_buffer: NonNegative = 4096
    """tokens before rollout.max_tokens over which the length reward falls from 1 to 0"""
    workers: Positive = 2
    """verifier processes per rank"""
    timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """seconds an answer may take before its worker is killed and it counts as wrong"""
    memory_mb: Annotated[int, Field(ge=512)] = 2048
    """memory cap of a worker"""

    @model_validator(mode="after")
    def _weights(self) -> RewardConfig:
        if abs(self.correctness + self.format + self.length - 1) > 1e-6:
            raise ValueError("reward.correctness + reward.format + reward.length must be 1")
        return self


class MIConfig(Section):
    estimator: Literal["coordinate", "pointwise", "position"] = "coordinate"
    """what the n samples of one hidden state are (docs/mi.md)"""
    features: Literal["random", "orthogonal", "quadrature"] = "random"
    """frequencies of the Fourier features; quadrature is deterministic, for scalars (coordinate) only"""
    num_features: Positive = 256
    """D"""
    sigma: Annotated[float, Field(gt=0)] | Literal["median"] = 50.0
    """kernel bandwidth, or the median heuristic"""
    center: bool = True
    """subtract feature means; false is a diagnostic only"""
    layer: int = -1
    """decoder layer whose raw residual stream is read; -1 is the last"""
    normalize: Literal["none", "layernorm", "zscore"] = "none"
    """normalisation of the states before the kernel"""
    gold_text: Literal["answer", "boxed", "question_answer"] = "answer"
    """text whose state is h*"""
    gold_pool: Literal["last", "mean"] = "last"
    """which token's state of that text"""
    token_chunk: Positive = 64
    """tokens whose features exist at one time"""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """pointwise: decay of the running cross-covariance"""
    warmup_steps: NonNegative = 10
    """pointwise: steps before the running estimate replaces the batch's own"""


class MaskConfig(Section):
    rule: Literal["threshold", "top_fraction", "peaks_only", "random", "all"] = "threshold"
    """which completion tokens are trained on; all is every token"""
    scope: Literal["sequence", "group", "batch", "running"] = "sequence"
    """over which tokens the statistics are taken"""
    statistic: Literal["mean_std", "iqr"] = "mean_std"
    """threshold mu + kappa * sigma, or Q3 + tau * IQR"""
    tau: Annotated[float, Field(gt=0)] = 1.5
    """of the iqr statistic"""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """of the rules top_fraction and random"""
    kappa_start: Annotated[float, Field(ge=0)] = 0.3
    """kappa at the first step, and for labelling"""
    kappa_end: Annotated[float, Field(ge=0)] = 0.1
    """lowest kappa"""
    kappa_schedule: Literal["combined", "linear", "plateau", "constant"] = "combined"
    """falls with the step, with stalls of the validation accuracy, with both, or not"""
    kappa_decay_steps: Positive | None = None
    """T_dec; null is optim.steps"""

    @model_validator(mode="after")
    def _kappa(self) -> MaskConfig:
        if self.kappa_end > self.kappa_start:
            raise ValueError(f"mask.kappa_end ({self.kappa_end}) must not exceed mask.kappa_start ({self.kappa_start})")
        return self


class CurriculumConfig(Section):
    enabled: bool = True
    """false draws questions uniformly and labels nothing"""
    t1: Fraction = 0.3
    """share of the steps before which the start mixture holds"""
    t2: Fraction = 0.7
    """share of the steps from which the end mixture holds"""
    start: tuple[Fraction, Fraction, Fraction] = (0.70, 0.25, 0.05)
    """probabilities of easy, medium, hard at first"""
    end: tuple[Fraction, Fraction, Fraction] = (0.25, 0.35, 0.40)
    """and at last"""
    bucket_by: Literal["count", "rate", "quantile"] = "count"
    """buckets by N_peak, by peaks per 512 tokens, or by thirds of the questions"""
    cuts: tuple[NonNegative, NonNegative] = (15, 25)
    """largest N_peak of easy and of medium"""
    probe_tokens: Positive = 512
    """peaks are counted in the first so many tokens"""
    refresh_every: Positive | None = None
    """steps between relabellings of the questions seen since, from their newest rollouts; null never does"""
    stall_patience: Positive = 3
    """P_val: validations without improvement that make a stall"""

    @model_validator(mode="after")
    def _order(self) -> CurriculumConfig:
        if self.t1 > self.t2:
            raise ValueError(f"curriculum.t1 ({self.t1}) must not exceed curriculum.t2 ({self.t2})")
        if self.cuts[0] >= self.cuts[1]:
            raise ValueError(f"curriculum.cuts must increase, got {list(self.cuts)}")
        for name in ("start", "end"):
            if abs(sum(getattr(self, name)) - 1) > 1e-6:
                raise ValueError(f"curriculum.{name} must sum to 1, got {sum(getattr(self, name)):g}")
        return self


class AdvantageConfig(Section):
    baseline: Literal["group", "batch", "leave_one_out"] = "group"
    """what is subtracted from a reward"""
    normalize: Literal["none", "std"] = "none"
    """divide by the sample standard deviation of the group"""
    mi_blend: Literal["none", "additive", "multiplicative"] = "none"
    """A + w z(MI) or A (1 + w z(MI)), z within the sequence"""
    mi_weight: Annotated[float, Field(ge=0)] = 0.1
    """w"""
    drop_constant_groups: bool = False
    """leave groups whose rewards do not vary out of the update (and of its average); saves their forward pass"""


class LossConfig(Section):
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """epsilon_low"""
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    """epsilon_high"""
    kl_beta: Annotated[float, Field(ge=0)] = 0.001
    """weight of the k3 KL to the initial model on selected tokens; 0 loads no reference model"""
    aggregation: Literal["sequence", "token", "constant", "all_tokens"] = "sequence"
    """mean in each sequence then over sequences (eq. 2), over all selected tokens, over max_tokens, over all tokens"""
    ratio: Literal["token"] = "token"
    """importance ratio of old and new policy"""


class OptimConfig(Section):
    steps: Positive = 500
    """optimizer steps' worth of rollout batches, S"""
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """learning rate of AdamW"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """after the warm-up; linear and cosine fall to 0 at the last step"""
    warmup_steps: NonNegative = 0
    """steps over which the rate rises linearly"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """of AdamW"""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """of AdamW"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """decoupled"""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """global gradient norm is clipped to it"""
    updates_per_batch: Positive = 1
    """optimizer steps a rollout batch is split into; 1 is strictly on-policy and needs no probe"""
    micro_tokens: Positive = 16384
    """tokens of a micro-batch, padding included; one sequence always fits"""
    packing: bool = False
    """pack sequences without padding into one row (wants flash_attention_2); else length-sorted padding"""
    share_prompts: bool = False
    """compute a prompt once for all its rollouts of a micro-batch, exactly; pays where prompts are long (sdpa only)"""


class ShardingConfig(Section):
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 3
    """of DeepSpeed: what is sharded over ranks; 0 is nothing, plain PyTorch without DeepSpeed"""
    offload_optimizer: bool = False
    """keep optimizer shards in host memory"""


class ValidationConfig(Section):
    every: Positive = 10
    """steps between validations; there is always one before and one after training"""
    questions: Positive | None = None
    """only the first so many; null is all"""
    samples: Positive = 4
    """a question, for avg@k"""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """0 is greedy"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """nucleus mass"""
    top_k: Annotated[int, Field(ge=-1)] = 20
    """-1 is off"""


class CheckpointConfig(Section):
    every: Positive = 20
    """steps between checkpoints; there is always one at the end"""
    keep_last: Positive = 2
    """older ones are removed, but for the best by held-out accuracy"""


class GuardsConfig(Section):
    max_bad_steps: Positive = 5
    """stop after so many steps in a row with a non-finite loss or gradient (each is skipped and its batch dumped)"""


class TrackingConfig(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online where the user is logged in, else offline"""
    project: str = "aipo"
    """wandb project"""
    plot_every: Positive = 10
    """steps between redrawings of the curves"""
    rollouts_per_step: NonNegative = 4
    """rollouts written out each step, with MI and mask of each token"""


class Config(Section):
    name: str
    """of the run; its folder is runs/<name>"""
    runs: str = "runs"
    """where run folders are"""
    seed: NonNegative = 0
    """a run is a function of its config and this"""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    mi: MIConfig = MIConfig()
    mask: MaskConfig = MaskConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    sharding: ShardingConfig = ShardingConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.mi.features == "quadrature" and self.mi.estimator != "coordinate":
            raise ValueError(
                "mi.features: quadrature is for scalars: use mi.estimator: coordinate, or features: random"
            )
        moments = self.rollout.max_tokens * self.mi.num_features**2
        if self.mi.estimator == "position" and moments > POSITION_ELEMENTS:
            raise ValueError(
                f"mi.estimator: position with {self.mi.num_features} features and {self.rollout.max_tokens} tokens "
                "needs over 1 GiB: lower mi.num_features"
            )
        if self.rollout.samples_per_question == 1 and self.advantage.baseline != "batch":
            raise ValueError(
                "rollout.samples_per_question: 1 leaves nothing to compare with: use advantage.baseline: batch"
            )
        truncated = self.rollout.top_p < 1 or self.rollout.top_k > 0
        if truncated and self.rollout.importance_correction != "none":
            raise ValueError(
                "rollout.top_p below 1 or rollout.top_k above 0 samples from another distribution than the policy's: "
                "set them to 1 and -1, or rollout.importance_correction: none"
            )
        if self.advantage.drop_constant_groups and self.advantage.baseline == "batch":
            raise ValueError("advantage.drop_constant_groups needs a baseline inside the group: group or leave_one_out")
        if self.optim.warmup_steps >= self.optim.steps:
            raise ValueError("optim.warmup_steps must be below optim.steps")
        if self.rollout.questions_per_step % self.optim.updates_per_batch:
            raise ValueError("optim.updates_per_batch must divide rollout.questions_per_step")
        if self.reward.length > 0 and self.reward.overlong_buffer >= self.rollout.max_tokens:
            raise ValueError("reward.overlong_buffer must be below rollout.max_tokens")
        if self.optim.share_prompts and (self.optim.packing or self.model.attention != "sdpa"):
            raise ValueError("optim.share_prompts needs model.attention: sdpa and optim.packing: false")
        if self.optim.packing and self.model.attention == "eager":
            raise ValueError("optim.packing needs model.attention: flash_attention_2 or sdpa")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    def check_world_size(self, world: int) -> None:
        per_update = self.rollout.questions_per_step // self.optim.updates_per_batch
        if per_update % world:
            raise UserError(
                f"rollout.questions_per_step ({self.rollout.questions_per_step}, {per_update} an update) is not "
                f"divisible by the {world} processes: change it or start another number of processes"
            )


def keys() -> Iterator[tuple[str, Any]]:
    """All leaf keys in order, as (dotted name, pydantic field)."""

    def walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from walk(field.annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field

    return walk(Config, "")


def type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    if origin is Literal:
        return "|".join(map(str, get_args(annotation)))
    if origin is types.UnionType or str(origin) == "typing.Union":
        return "|".join(type_name(a) for a in get_args(annotation))
    if origin is tuple:
        return "[" + ", ".join("..." if a is Ellipsis else type_name(a) for a in get_args(annotation)) + "]"
    return "null" if annotation is type(None) else annotation.__name__


def help_keys() -> str:
    """One line a key: name, type, default, meaning."""
    lines = []
    for name, field in keys():
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        default = "required" if field.is_required() else f"default {json.dumps(value)}"
        lines.append(f"  {name}  ({type_name(field.annotation)}; {default})\n      {field.description}")
    return "\n".join(lines)


def find_config(name: str, asked_by: str = "") -> Path:
    """A path as given, or a name without a folder in ``configs/`` (with or without ``.yaml``)."""
    candidates = [Path(name)]
    if Path(name).name == name:
        candidates += [CONFIG_FOLDER / name, CONFIG_FOLDER / f"{name}.yaml"]
    elif not Path(name).is_absolute():
        candidates += [CONFIG_FOLDER / name]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted(str(p.relative_to(CONFIG_FOLDER)) for p in CONFIG_FOLDER.rglob("*.yaml"))
    near = difflib.get_close_matches(Path(name).name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{asked_by}config {name} not found here or in configs/ (there: {', '.join(known)}){hint}")


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read ``name`` with its bases, apply ``key.path=value`` overrides, validate.

    Raises:
        UserError: with the key and the file or override that is wrong.
    """
    values: dict[str, Any] = {}  # dotted key -> value
    origin: dict[str, str] = {}  # dotted key -> the file or override that set it
    path = find_config(name)
    for layer, tree in [*_layers(path), *map(_parse_override, overrides)]:
        for key, value in _flatten(tree):
            _check_key(key, layer)
            values[key], origin[key] = value, layer
    values.setdefault("name", path.stem)
    try:
        return Config.model_validate(_unflatten(values))
    except ValidationError as error:
        raise UserError("; ".join(_explain(e, origin, path) for e in error.errors())) from None


def dump_config(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(file, content) from the deepest base to the file itself."""
    if path.resolve() in seen:
        raise UserError(f"{path}: base: goes in a circle")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold keys and values, not a {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return [(str(path), tree)]
    parent = path.parent / str(base)
    if not parent.is_file():
        parent = find_config(str(base), asked_by=f"{path}: base: ")
    return [*_layers(parent, (*seen, path.resolve())), (str(path), tree)]


def _parse_override(text: str) -> tuple[str, dict[str, Any]]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r} must look like optim.lr=2e-6")
    try:
        return f"override {text}", {key: yaml.safe_load(value)}
    except yaml.YAMLError:
        raise UserError(f"override {text}: the value is not YAML (text with signs in it needs quotes)") from None


_SECTIONS = {
    n: f.annotation
    for n, f in Config.model_fields.items()
    if isinstance(f.annotation, type) and issubclass(f.annotation, Section)
}


def _flatten(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key in _SECTIONS:
            yield from _flatten(value, f"{key}.")
        elif value is None and key in _SECTIONS:
            continue  # an empty section of a YAML file
        else:
            yield key, _number(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as a string; a number is meant."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[:1] in "0123456789.-+" else value
        except ValueError:
            return value
    return value


def _unflatten(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, leaf = key.partition(".")
        if dot:
            tree.setdefault(section, {})[leaf] = value
        else:
            tree[key] = value
    return tree


def _check_key(key: str, layer: str) -> None:
    known = [name for name, _ in keys()]
    if key in known:
        return
    if key in _SECTIONS:
        raise UserError(
            f"{layer}: {key} is a section: it takes keys such as {next(k for k in known if k.startswith(key + '.'))}"
        )
    leaf = key.rpartition(".")[2]
    near = (
        difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [k for k in known if k.rpartition(".")[2] == leaf][:1]
    )
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists all keys"
    raise UserError(f"{layer}: unknown key {key}{hint}")


def _explain(error: Any, origin: dict[str, str], path: Path) -> str:
    parts = [str(p) for p in error["loc"]]
    key = next((k for n in (2, 1) if (k := ".".join(parts[:n])) in origin), ".".join(parts[:2]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{origin[key]}: {key}: too few values" if key in origin else f"{path}: {key} is required"
    if error["type"] == "value_error":  # our own messages name the keys
        sources = dict.fromkeys(source for key, source in origin.items() if "." in key and key in message)
        return f"{', '.join(sources) or path}: {message}"
    return f"{origin.get(key, path)}: {key}: {message[0].lower()}{message[1:]}, got {error['input']!r}"
