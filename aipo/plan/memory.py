"""The arithmetic behind ``--dry-run``: bytes of a rank by phase and purpose.

Parameters are counted on the model itself (:mod:`aipo.plan.planner`); everything else is computed here, P parameters of
which p are trained, on N ranks. The formulas follow sharding.py, policy.py and DeepSpeed's defaults;
``bench/memory.py`` compares them with real runs.

What is left out because it stays below the training forward at the same ``micro_tokens``: every pass without gradient
beside it (probes, entropies, early exits, the reference), and generation beyond the KV cache, whose size is fixed
(branches, continuations and dynamic sampling make sequences wait, not memory grow).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from aipo.config import Config
from aipo.mi import CACHE_ELEMENTS, CHUNK_ELEMENTS, tokens_that_fit
from aipo.rollout import hf
from aipo.rollout.check import NOISE_ELEMENTS
from aipo.scorer import BLOCK_ELEMENTS

MIB, GIB = 2**20, 2**30

# Measured once, idle: what a process takes before it holds any weights.
CPU_LIBRARIES = 650 * MIB  # resident: interpreter, torch, transformers, DeepSpeed, this package, their thread arenas
CPU_ENGINE_LIBRARIES = 250 * MIB  # resident: vLLM on top of it
GPU_CONTEXT = 2 * GIB  # not measured yet: CUDA context, NCCL, fragmentation, what vLLM keeps while it sleeps
GPU_ENGINE_EXTRA = 3 * GIB  # not measured yet: activations, sampler and CUDA graphs of vLLM, out of its own share

BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
LIVE = 1_000_000_000 + 50_000_000  # its stage3_max_live_parameters and prefetch bucket, in elements
SUB_GROUP = 1_000_000_000  # elements that its ZeRO-3 optimizer updates at a time

Bytes = dict[str, int]
"""purpose -> bytes"""


@dataclass(frozen=True)
class Model:
    """The sizes that memory depends on."""

    source: str
    parameters: int  # P, tied ones once
    layers: int
    width: int  # d
    mlp: int  # f
    queries: int  # q: heads x head size
    keys: int  # k: key-value heads x head size
    qk_norm: bool
    vocabulary: int  # V
    context: int  # tokens
    tied: bool
    linears: tuple[tuple[str, int], ...] = ()  # name and in + out features of every linear layer but the head

    def trained(self, config: Config) -> int:
        """p: all parameters or, with LoRA, rank x (in + out) of each adapted layer."""
        lora = config.lora
        if lora.rank == 0:
            return self.parameters
        every = "all-linear" in lora.targets
        ends = tuple(f".{target}" for target in lora.targets)
        return lora.rank * sum(size for name, size in self.linears if every or f".{name}".endswith(ends))


@dataclass(frozen=True)
class Layout:
    """What a run asks of one rank."""

    device: str  # "GPU" or "CPU"
    capacity: int  # bytes that it may use
    ranks: int  # N
    rollouts: int  # of the rank in a step
    longest: int  # tokens of the longest sequence
    tokens: int  # of the largest micro-batch
    reads: float = 1.0  # keys that attention has for each token, more than one where prompts are shared
    row: int = 0  # where attention goes by blocks of segments, keys in their masks for each token


def activation_bytes(
    model: Model,
    tokens: int,
    *,
    residual: int,
    compute: int,
    checkpointing: bool,
    reads: float = 1.0,
    row: int = 0,
    gradient: bool = True,
) -> int:
    """Peak of what the decoder's forward and backward pass keep, for ``tokens``.

    With r bytes in the residual stream and b in the products, autograd keeps of a layer, per token::

        2 norms         2 d (4 + r + b)    float32 input, normalised, output
        q and k norms   (q + k) (4 + b)    where there are such
        attention       2 q b + 2 k b reads    q, output, k and v; where prompts are shared, copied to ``reads`` tokens
        blocks (row)    q b                output in the order of the row
        MLP             4 f b              gate, up, activation, their product

    and for all layers together q / k row b of the masks of blocks, for the heads of a group. With checkpointing that
    is one layer, plus d r for the input of each. The backward pass adds 2 f b + 8 d. (Eager attention keeps more.)
    Without ``gradient`` there is one layer, of which attention is gone before the MLP, and of that 3 f b are left.
    """
    d, f, q, k, b = model.width, model.mlp, model.queries, model.keys, compute
    attention = (q + k) * (4 + b) if model.qk_norm else 0
    attention += 2 * q * b + int(2 * k * b * reads) + (q * b if row else 0)
    once = 2 * d * residual + q // k * row * b  # hidden states picked out for the mutual information and for the head
    if not gradient:
        return tokens * (2 * d * (residual + b) + max(attention, 3 * f * b) + once)
    layer = 2 * d * (4 + residual + b) + attention + 4 * f * b
    kept = model.layers * d * residual + layer if checkpointing else model.layers * layer
    return tokens * (kept + 2 * f * b + 8 * d + once)


def head_bytes(
    model: Model, chunk: int, compute: int, weight: int, *, trained: bool = True, block: int | None = None
) -> int:
    """Peak of the chunked head, for float32 blocks of ``block`` rows (None is all) of (chunk, V) products in b bytes.

    A block is there twice, in the backward pass beside the gradient of the weight (V, d), if trained: a float32 sum
    there, the sum and its product in the end.
    """
    rows = min(block or chunk, chunk)
    product, floats = compute * chunk * model.vocabulary, 8 * rows * model.vocabulary
    matrix = model.vocabulary * model.width * trained
    return max(product + floats + 4 * matrix, product + (4 + compute) * matrix, (4 + weight) * matrix)


def compute_bytes(config: Config) -> int:
    return 2 if config.model.bfloat16 else 4


def phases(config: Config, model: Model, layout: Layout) -> dict[str, Bytes]:
    """start-up, sync check, labelling, rollout, branching, sync, update, optimizer step (those that the config has) ->
    purpose -> bytes."""
    resident, passing = training(config, model, layout), forward_backward(config, model, layout)
    weights, cache = engine(config, model, layout)
    on_cpu, stage = layout.device == "CPU", config.sharding.zero_stage
    size, share = compute_bytes(config), math.ceil(model.parameters / layout.ranks)
    # nothing sleeps on a CPU; Hugging Face's engine keeps no cache between its calls
    idle = ((weights | cache) if config.rollout.engine == "vllm" else weights) if on_cpu else {}
    # an engine that draws the next batch is awake during the update
    beside = weights | cache if config.rollout.async_depth else idle
    reading = forward_backward(config, model, layout, gradient=False)
    made = {
        "start-up": idle | resident,
        **({"sync check": weights | idle | resident | perturbing(config, model)} if config.rollout.check_sync else {}),
        **({"labelling": idle | resident | reading} if config.curriculum.enabled else {}),
        "rollout": weights | cache | resident,
        **({"branching": weights | cache | resident | reading} if config.branch.enabled else {}),
        "sync": weights | beside | resident,
        "update": beside | resident | passing,
        "optimizer step": beside | resident,
    }
    if stage == 3:
        whole = size * model.parameters
        if config.loss.kl_beta == 0:  # nothing else of the policy is there yet
            whole = max(whole + size * share + resident["libraries"] - sum(resident.values()), 0)
        # DeepSpeed moves a whole model to the device before it cuts it up; the reference model is the last
        made["start-up"]["weights before sharding"] = whole
        # the largest matrix and its copy for the engine, when the new weights are handed over
        made["sync"]["gathered weights"] = 2 * size * model.vocabulary * model.width
    if stage and not config.sharding.offload_optimizer:  # DeepSpeed hands AdamW a copy
        part = math.ceil(model.trained(config) / layout.ranks)
        made["optimizer step"]["gradients as a copy"] = 4 * (min(part, SUB_GROUP) if stage == 3 else part)
    if on_cpu:
        # glibc returns to the system only what lies on top of its heap, or was large (over 32 MiB): memory of the
        # activations and of weights gathered a matrix at a time stays with the process when it is free again
        for purpose in ("activations", "gathered weights"):
            if purpose in passing:
                made["optimizer step"][f"{purpose}, freed"] = passing[purpose]
        # Padded or packed micro-batches differ in shape, and the heap finds no place for one where another was.
        # (Measured; rows of shared prompts, which are cut at the same number of tokens, fit.)
        if not config.optim.share_prompts and layout.rollouts * layout.longest > layout.tokens:
            made["update"]["activations, freed"] = passing["activations"]
    return made


def training(config: Config, model: Model, layout: Layout) -> Bytes:
    """Always there: weights, gradients, optimizer, the reference model."""
    stage, parameters, trained = config.sharding.zero_stage, model.parameters, model.trained(config)
    share, trained_share = math.ceil(parameters / layout.ranks), math.ceil(trained / layout.ranks)
    compute = compute_bytes(config)
    weight = compute if stage else 4
    held = {
        "libraries": CPU_LIBRARIES if layout.device == "CPU" else GPU_CONTEXT,
        "weights": weight * (share if stage == 3 else parameters),
        "gradients": 4 * (trained_share if stage >= 2 else trained),  # accumulated in float32
        # AdamW's two moments and, under DeepSpeed, float32 masters
        "optimizer": 12 * trained_share if stage else 8 * trained,
    }
    if stage:
        # memory of a CPU is taken only where it is written
        bucket = BUCKET if layout.device == "GPU" else min(BUCKET, trained)
        held["gradient bucket"] = (4 if stage == 1 else compute) * bucket
    if config.sharding.offload_optimizer and stage and layout.device == "GPU":
        held["optimizer"] = 0
        held["gradients"] *= stage == 1  # ZeRO-2 and 3 accumulate their shards on the host, too
    if config.loss.kl_beta > 0:
        held["reference model"] = compute * (share if stage == 3 else parameters)
    return held


def perturbing(config: Config, model: Model) -> Bytes:
    """For the check of the sync: the largest matrix, a noisy copy and a piece of the noise."""
    stage, compute, matrix = config.sharding.zero_stage, compute_bytes(config), model.vocabulary * model.width
    own = compute if stage else 4
    held = {"noisy copy": (own + (0 if own == compute else compute)) * matrix + 4 * NOISE_ELEMENTS}
    return held | ({"gathered weights": own * matrix} if stage == 3 else {})


def forward_backward(config: Config, model: Model, layout: Layout, *, gradient: bool = True) -> Bytes:
    """In the forward and backward pass of the largest micro-batch or, without ``gradient``, in a forward pass."""
    stage, compute, trained = config.sharding.zero_stage, compute_bytes(config), model.trained(config)
    weight = compute if stage else 4
    chunk = min(config.model.head_chunk, layout.tokens)
    cached = layout.device == "CPU" and config.mi.estimator == "coordinate"
    passing = {
        "activations": activation_bytes(
            model,
            layout.tokens,
            residual=weight,
            compute=compute,
            checkpointing=config.model.gradient_checkpointing,
            reads=layout.reads,
            row=layout.row,
            gradient=gradient,
        ),
        "logits and head": head_bytes(
            model,
            chunk,
            compute,
            weight,
            trained=config.lora.rank == 0 and gradient,
            block=tokens_that_fit(model.vocabulary, CACHE_ELEMENTS) if layout.device == "CPU" else None,
        ),
        # of a chunk of tokens, and beside it the factors of gold states, or the states that mi.normalize makes
        "MI features": 8 * (CACHE_ELEMENTS if cached else CHUNK_ELEMENTS) + 12 * layout.longest * model.width,
    }
    if config.mi.estimator == "position":
        # sums of a position and a gold state, of which zscore makes one of each rollout; and two blocks of moments
        golds = layout.rollouts // (1 if config.mi.normalize == "zscore" else config.rollout.samples_per_question)
        sums = golds * config.rollout.max_tokens * config.mi.num_features
        passing["MI by position"] = 8 * (sums + 2 * max(BLOCK_ELEMENTS, config.mi.num_features**2))
    if stage == 1 and compute == 2 and gradient:
        passing["bfloat16 gradients"] = 2 * trained  # before they are added to the float32 ones
    if stage == 0 and compute == 2:
        passing["bfloat16 copy (autocast)"] = 2 * model.parameters
    if stage == 3:
        models = 2 if config.loss.kl_beta > 0 and gradient else 1  # policy and reference
        passing["gathered weights"] = models * compute * min(model.parameters, LIVE)
    return passing


def engine(config: Config, model: Model, layout: Layout) -> tuple[Bytes, Bytes]:
    """(weights of the rollout engine, its KV cache) on this rank's device."""
    size, rollout = compute_bytes(config), config.rollout
    if rollout.mode == "server":
        return {}, {}
    weights = size * model.parameters
    token = kv_token_bytes(config, model)
    if rollout.engine == "hf":
        share = int(rollout.gpu_memory_utilization * layout.capacity)
        cached = (share - weights) // token if layout.device == "GPU" else None
        rows = min(hf.rows_together(layout.longest, cached), layout.rollouts)
        return {"engine weights": weights}, {"KV cache": rows * layout.longest * token}
    if layout.device == "GPU":
        room = int(rollout.gpu_memory_utilization * layout.capacity - weights - GPU_ENGINE_EXTRA)
        return {"engine weights": weights + GPU_ENGINE_EXTRA}, {"KV cache": max(room, 0) // token * token}
    head = size * model.vocabulary * model.width if model.tied else 0  # vLLM packs a copy of a tied head
    cache = int(rollout.kv_cache_gb * GIB) // token * token
    return {"engine weights": weights + head, "engine libraries": CPU_ENGINE_LIBRARIES}, {"KV cache": cache}


def kv_token_bytes(config: Config, model: Model) -> int:
    """Keys and values of one token in all layers."""
    return hf.kv_token_bytes(model.layers, model.keys, compute_bytes(config))
