"""What a run will need of each GPU, worked out before any weight is loaded (``--dry-run``).

Parameters are counted on the model itself, built on the meta device; the bytes are :mod:`aipo.plan.memory`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import psutil
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from aipo.config import Config
from aipo.errors import UserError
from aipo.model.loading import attention_widths, skeleton
from aipo.model.precision import Precision, choose
from aipo.plan.memory import GIB, Bytes, Layout, Model, compute_bytes, kv_token_bytes, phases
from aipo.problems import embedded

GPU_SCALE = 1_000_000_000  # parameters from which a machine without a GPU is taken to plan for another one

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960}
_LLAMA = {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192}


def _sizes(width: int, mlp: int, layers: int, heads: int, kv_heads: int, head: int, tied: bool) -> dict[str, Any]:
    own = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return own | {"num_key_value_heads": kv_heads, "head_dim": head, "tie_word_embeddings": tied}


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-1.7B": _QWEN3 | _sizes(2048, 6144, 28, 16, 8, 128, tied=True),
    "Qwen/Qwen3-4B": _QWEN3 | _sizes(2560, 9728, 36, 32, 8, 128, tied=True),
    "Qwen/Qwen3-8B": _QWEN3 | _sizes(4096, 12288, 36, 32, 8, 128, tied=False),
    "Qwen/Qwen3-14B-Base": _QWEN3 | _sizes(5120, 17408, 40, 40, 8, 128, tied=False),
    "Qwen/Qwen3-32B": _QWEN3 | _sizes(5120, 25600, 64, 64, 8, 128, tied=False),
    embedded.MODEL: _LLAMA | _sizes(576, 1536, 30, 9, 3, 64, tied=True),
}
"""Architectures as published, so that a plan needs neither the weights nor the hub."""


@dataclass(frozen=True)
class Plan:
    """Bytes per rank by phase and purpose; ``problems`` will stop the run, ``warnings`` will not."""

    model: Model
    ranks: int
    device: str  # "GPU" or "CPU"
    capacity: int  # bytes a rank may use
    precision: Precision
    phases: dict[str, Bytes]  # start-up, ..., optimizer step -> purpose -> bytes
    tokens: dict[str, str]
    problems: list[str]
    warnings: list[str]

    def peak(self, phase: str) -> int:
        return sum(self.phases[phase].values())


@cache  # a campaign plans many runs of one model
def read_model(path: str) -> Model:
    """Architecture of a folder, a hub id or the embedded model; raises ``UserError`` if it cannot be had."""
    from transformers import AutoConfig

    config, source = _architecture(path, AutoConfig)
    model = skeleton(config, key="model.path", name=path)
    queries, keys = attention_widths(config)
    return Model(
        source=source,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        mlp=config.intermediate_size,
        queries=queries,
        keys=keys,
        qk_norm=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
        linears=tuple(
            (name, module.in_features + module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
        ),
    )


def _architecture(path: str, auto: Any) -> tuple[Any, str]:
    name = path if path in PUBLISHED else embedded.resolve_model(path)
    try:
        return auto.from_pretrained(name, local_files_only=True), f"config.json of {path}"
    except (OSError, ValueError):
        if name in PUBLISHED:  # asked before the hub, which takes long to give up without a network
            sizes = dict(PUBLISHED[name])
            return auto.for_model(sizes.pop("model_type"), **sizes), "built-in table of published architectures"
    try:
        return auto.from_pretrained(name), f"config.json of {path} on the hub"
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path {path}: no architecture to plan with ({reason}): give a folder with a config.json, "
            f"or one of {', '.join(PUBLISHED)}, which need no network"
        ) from None


def plan(config: Config, gpus: int, *, gpu_memory_gb: float | None = None) -> Plan:
    """Memory and tokens of a run of ``config`` on ``gpus`` ranks.

    Args:
        gpu_memory_gb: GiB of one GPU; None asks the GPU here or, without one, takes 80 for models of over a billion
            parameters and plans for this machine's main memory for smaller ones.

    Raises:
        UserError: no architecture, a context longer than the model's, a world size that does not divide the batch.
    """
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {gpus}")
    config.check_world_size(gpus)
    model = read_model(config.model.path)
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    if longest > model.context:
        raise UserError(
            f"data.max_prompt_tokens ({config.data.max_prompt_tokens}) + rollout.max_tokens "
            f"({config.rollout.max_tokens}) exceed the {model.context} tokens that {config.model.path} can read"
        )
    device, capacity, assumed = _capacity(model.parameters, gpus, gpu_memory_gb)
    precision = choose(config.model.dtype, "cuda" if device == "GPU" else "cpu")
    config = precision.settle(config)
    rows = config.rollout.questions_per_step * config.rollout.samples_per_question // gpus
    rows_update = rows // config.optim.updates_per_batch
    tokens = min(max(config.optim.micro_tokens, longest), rows_update * longest)
    reads = longest / config.rollout.max_tokens if config.optim.share_prompts else 1.0
    one_row = (config.optim.packing or config.optim.share_prompts) and config.model.attention == "sdpa"
    by_blocks = one_row and (device == "CPU" or compute_bytes(config) == 4)  # else by flash attention, without masks
    layout = Layout(device, capacity, gpus, rows, longest, tokens, reads, longest if by_blocks else 0)
    made_phases = phases(config, model, layout)
    kv_tokens = made_phases["rollout"].get("KV cache", 0) // kv_token_bytes(config, model)
    held = kv_tokens // longest
    per_micro = max(config.optim.micro_tokens // longest, 1)
    table = {
        "questions a step": f"{config.rollout.questions_per_step}, {config.rollout.questions_per_step // gpus} a rank",
        "rollouts a step": f"{rows * gpus}, {rows} a rank",
        "tokens a step, at most": f"{rows * gpus * longest:,}, {rows * longest:,} a rank",
        "longest sequence": f"{longest:,} of {model.context:,}; optim.micro_tokens {config.optim.micro_tokens:,}",
        "micro-batches an update": f"at most {math.ceil(rows_update / per_micro)} a rank, "
        f"{math.ceil(rows_update / max(2 * config.optim.micro_tokens // longest, 1))} at half the length",
    }
    if config.rollout.mode == "colocate":
        table["sequences at full length"] = f"{held:,} at once in the KV cache ({kv_tokens:,} tokens)"
    made = Plan(model, gpus, device, capacity, precision, made_phases, table, [], [])
    if assumed:
        made.warnings.append("no GPU here: planned for GPUs of 80 GiB (--gpu-memory-gb says otherwise)")
    _judge(made, config, held, rows, longest)
    return made


def _capacity(parameters: int, ranks: int, gpu_memory_gb: float | None) -> tuple[str, int, bool]:
    """("GPU" or "CPU", bytes a rank may use, whether the GPU is only supposed)."""
    if gpu_memory_gb is not None:
        return "GPU", int(gpu_memory_gb * GIB), False
    if torch.cuda.is_available():
        return "GPU", torch.cuda.get_device_properties(0).total_memory, False
    if parameters >= GPU_SCALE:
        return "GPU", 80 * GIB, True
    return "CPU", psutil.virtual_memory().total // ranks, False


def _judge(made: Plan, config: Config, held: int, rows: int, longest: int) -> None:
    """Fill in what does not fit, with the keys that would help, and what is worth knowing."""
    problems, warnings = made.problems, made.warnings
    for phase, purposes in made.phases.items():
        peak, room = made.peak(phase), made.capacity
        if peak > room:
            largest = sorted(purposes, key=lambda p: -purposes[p])[:3]
            needs = ", ".join(f"{p} {purposes[p] / GIB:.1f}" for p in largest)
            problems.append(
                f"{phase} needs {peak / GIB:.1f} GiB, a rank has {room / GIB:.1f} (most for: {needs}). "
                f"Try {'; '.join(_remedies(made, config, purposes, longest)) or 'more or larger GPUs'}"
            )
        elif peak > 0.9 * room:
            warnings.append(f"{phase} fills {peak / room:.0%} of the memory, and the plan is an estimate")
    vllm = config.rollout.engine == "vllm" and config.rollout.mode == "colocate"
    key = "rollout.gpu_memory_utilization" if made.device == "GPU" else "rollout.kv_cache_gb"
    if vllm and held < 1:
        problems.append(f"the KV cache does not hold one sequence of {longest:,} tokens. Try a larger {key}")
    elif vllm and held < rows:
        warnings.append(
            f"the KV cache holds {held} of a rank's {rows} sequences at full length: long ones wait. "
            f"A larger {key} or more ranks would help"
        )
    if longest > config.optim.micro_tokens:
        warnings.append(f"one sequence may exceed optim.micro_tokens: activations are planned for {longest:,} tokens")
    if config.model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        warnings.append("model.attention: flash_attention_2 needs the package flash-attn, which is not installed here")
    if made.device == "GPU" and config.sharding.offload_optimizer:
        # float32: masters and AdamW's two, sums of gradients at stage 2, and a copy of these at stage 3
        host = {3: 20, 2: 16}.get(config.sharding.zero_stage, 12) * made.model.trained(config)
        warnings.append(
            f"offload_optimizer takes {host / GIB:.0f} GiB of host memory over all ranks, and more on a resume"
        )


def _remedies(made: Plan, config: Config, purposes: dict[str, int], longest: int) -> list[str]:
    """Keys that lower what takes at least a twentieth of the memory, the largest first."""
    stage, optim = config.sharding.zero_stage, config.optim
    sharded = f"sharding.zero_stage: 3 (now {stage})" if stage < 3 and made.ranks > 1 else None
    checkpointing = None if config.model.gradient_checkpointing else "model.gradient_checkpointing: true"
    fewer = "optim.micro_tokens" if optim.micro_tokens > longest else "rollout.max_tokens"
    smaller = "rollout.gpu_memory_utilization" if made.device == "GPU" else "rollout.kv_cache_gb"
    offload = made.device == "GPU" and not config.sharding.offload_optimizer
    help_for = {
        "weights": sharded,
        "gradients": sharded,
        "optimizer": sharded or ("sharding.offload_optimizer: true" if offload else None),
        "reference model": sharded or "loss.kl_beta: 0 (no reference model)",
        "weights before sharding": "loss.kl_beta: 0 (no reference model)" if config.loss.kl_beta > 0 else None,
        "activations": checkpointing or f"a smaller {fewer}",
        "logits and head": "a smaller model.head_chunk",
        "KV cache": f"a smaller {smaller}"
        if config.rollout.engine == "vllm" or made.device == "GPU"
        else "a smaller rollout.max_tokens",
    }
    wanted = sorted((p for p in purposes if purposes[p] > made.capacity / 20), key=lambda p: -purposes[p])
    return list(dict.fromkeys(h for p in wanted if (h := help_for.get(p))))


def render(plan: Plan) -> Group:
    """Tables and lines for ``rich.print``; ends with what does not fit."""
    memory = Table(title=f"Memory of each of {plan.ranks} {plan.device} rank(s), GiB of {plan.capacity / GIB:.1f}")
    memory.add_column("")
    for phase in plan.phases:
        memory.add_column(phase, justify="right")
    for purpose in dict.fromkeys(p for phase in plan.phases.values() for p in phase):
        sizes = [phase.get(purpose) for phase in plan.phases.values()]
        memory.add_row(purpose, *("" if s is None else f"{s / GIB:.2f}" for s in sizes))
    memory.add_section()
    memory.add_row("peak", *(f"{plan.peak(phase) / GIB:.2f}" for phase in plan.phases), style="bold")
    tokens = Table(show_header=False, title="Tokens")
    for label, value in plan.tokens.items():
        tokens.add_row(label, value)
    verdict = [Text(f"does not fit: {line}", style="red") for line in plan.problems] or [Text("fits", style="green")]
    return Group(
        Text(f"model: {plan.model.parameters:,} parameters ({plan.model.source})"),
        *map(Text, plan.precision.lines),
        memory,
        tokens,
        *(Text(f"note: {line}", style="yellow") for line in plan.warnings),
        *verdict,
    )
