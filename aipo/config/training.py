"""How a model is trained and what is kept, by section: every key with type, default and meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from aipo.config.base import NonNegative, Positive, Section


class ModelConfig(Section):
    path: str
    """Hugging Face folder (such as runs/NAME/final), hub id, or embedded:smollm2-135m"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of engine and trainer; auto: bfloat16 where the hardware multiplies it, else float32; kept by a resumed run"""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """attention implementation of transformers"""
    gradient_checkpointing: bool = True
    """recompute each layer in the backward pass: less memory, about a third more compute"""
    head_chunk: Positive = 1024
    """positions whose logits exist at one time"""

    @property
    def bfloat16(self) -> bool:
        """Whether the passes compute in it, once aipo.model.precision has put a dtype in the place of ``auto``."""
        if self.dtype == "auto":
            raise ValueError("model.dtype is still auto: aipo.model.precision.choose settles it")
        return self.dtype == "bfloat16"


class LoraConfig(Section):
    rank: NonNegative = 0
    """of LoRA adapters, which alone are trained then; 0 trains all weights"""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """an adapter's output is multiplied by alpha / rank"""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("all-linear",)
    """names of the layers that get one, such as q_proj; all-linear is every linear layer but the head"""


class OptimConfig(Section):
    steps: Positive = 500
    """rollout batches, S; each makes optim.updates_per_batch optimizer steps"""
    generated_tokens: Positive | None = None
    """the run ends before S once it has generated so many tokens in training; for comparisons at equal cost"""
    lr: Annotated[float, Field(gt=0)] = 1e-6
    """learning rate of AdamW"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """after the warm-up; linear and cosine fall towards 0, which would be the step behind the last"""
    warmup_steps: NonNegative = 0
    """steps over which the rate rises linearly"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """of AdamW"""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """of AdamW"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """of AdamW, decoupled from the gradient"""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """global gradient norm is clipped to it"""
    updates_per_batch: Positive = 1
    """optimizer steps a rollout batch is split into; 1 is strictly on-policy and needs no probe"""
    micro_tokens: Positive = 16384
    """tokens of a micro-batch, padding included; one sequence always fits"""
    packing: bool = False
    """pack sequences without padding into one row (sdpa or flash_attention_2); else length-sorted padding"""
    share_prompts: bool = False
    """compute a prompt once for all its rollouts of a micro-batch, exactly; pays where prompts are long (sdpa only)"""


class ShardingConfig(Section):
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 3
    """of DeepSpeed: what is sharded over ranks; 0 is nothing, plain PyTorch without DeepSpeed"""
    offload_optimizer: bool = False
    """keep optimizer shards in host memory"""


class CheckpointConfig(Section):
    every: Positive = 20
    """steps between checkpoints; there is always one at the end"""
    keep_last: Positive = 2
    """older ones are removed, but for the best by held-out accuracy"""


class GuardsConfig(Section):
    max_bad_steps: Positive = 5
    """stop after so many steps in a row with a non-finite loss or gradient (each is skipped and its batch dumped)"""
    max_gap: Annotated[float, Field(gt=0)] = 0.5
    """nats a token (mismatch/gap) from engine to policy: a step beyond says so, max_bad_steps in a row stop"""


class TrackingConfig(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online where the user is logged in, else offline"""
    project: str = "aipo"
    """wandb project"""
    plot_every: Positive = 10
    """steps between redrawings of the curves"""
    rollouts_per_step: NonNegative = 4
    """groups written out each step with every figure of their tokens (Parquet), and rollouts as lines of JSON"""
    tokens_mb: Annotated[float, Field(gt=0)] = 1024.0
    """MiB that the Parquet of all steps may take together; a step has an equal share"""
    report: bool = True
    """write report.html when the run ends"""
    replay: bool = True
    """keep the batches since the oldest kept checkpoint, 8 bytes a completion token, for python -m aipo.replay"""
