"""A frozen policy beside the engine that draws from it, in one process, for measurements."""

from __future__ import annotations

from typing import Any

import torch

from aipo.config import Config
from aipo.inputs import Inputs
from aipo.policy import make_policy
from aipo.reward import Rewarder
from aipo.rollout import make_engine
from aipo.rollout.collect import Collector
from aipo.sharding import Sharded, shard

FIXED = ["sharding.zero_stage=0", "optim.share_prompts=false", "curriculum.enabled=false", "loss.kl_beta=0"]
"""Keys of a config that measuring settles: nothing is sharded, and every sequence has a row of its own."""


def build(config: Config, inputs: Inputs, device: torch.device) -> tuple[Collector, Sharded]:
    options: dict[str, Any] = {"dtype": config.model.dtype, "seed": config.seed}
    if config.rollout.engine == "vllm":
        options["gpu_memory_utilization"] = config.rollout.gpu_memory_utilization
        options["kv_cache_gb"] = None if device.type == "cuda" else config.rollout.kv_cache_gb
    engine = make_engine(
        config.rollout.engine,
        inputs.model_path,
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_tokens,
        end_token_ids=sorted(inputs.prompter.end_ids),
        **options,
    )
    rewarder = Rewarder(config.rewards(), max_tokens=config.rollout.max_tokens, thinking=config.data.thinking)
    sharded = shard(make_policy(config, inputs.model_path), config, device)
    return Collector(engine, inputs.prompter, rewarder, seed=config.seed), sharded
