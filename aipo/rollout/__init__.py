"""Rollout engines behind one interface: vLLM in this process or on servers, plain Hugging Face generation elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import Any, Literal

import torch

from aipo.config import Config
from aipo.errors import UserError
from aipo.rollout.base import Completion, Request, RolloutEngine, Sampling
from aipo.rollout.hf import HfEngine
from aipo.rollout.vllm import INSTALL, VllmEngine

__all__ = ["Completion", "Request", "RolloutEngine", "Sampling", "engine_options", "make_engine", "require_engine"]

EngineKind = Literal["vllm", "hf", "server"]


def require_engine(kind: EngineKind) -> None:
    """Raise :class:`UserError` if the engine's library is not installed; imports nothing, so it is quick."""
    if kind != "hf" and find_spec("vllm") is None:
        raise UserError(f"the rollout engine 'vllm' is not installed: {INSTALL}")


def make_engine(kind: EngineKind, model_path: str, **options: Any) -> RolloutEngine:
    """Build an engine; ``options`` are the keyword arguments of its class.

    Raises :class:`UserError` if vLLM is wanted and cannot be imported.
    """
    require_engine(kind)
    if kind == "server":
        from aipo.rollout.server import ServerEngine  # also a script, so not imported with the package

        return ServerEngine(model_path, **options)
    engines: dict[str, Callable[..., RolloutEngine]] = {"vllm": VllmEngine, "hf": HfEngine}
    return engines[kind](model_path, **options)


def engine_options(config: Config, end_ids: Collection[int], device: torch.device) -> dict[str, Any]:
    """Options of :func:`make_engine` for a config: context, end of a completion, and what it may take on a device."""
    rollout = config.rollout
    options: dict[str, Any] = {
        "max_model_len": config.data.max_prompt_tokens + rollout.max_tokens,
        "end_token_ids": sorted(end_ids),
        "dtype": config.model.dtype,
    }
    if rollout.mode == "colocate":
        options["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        if rollout.engine == "vllm":
            options["kv_cache_gb"] = None if device.type == "cuda" else rollout.kv_cache_gb
    return options
