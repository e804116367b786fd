"""Rollout engines behind one interface: vLLM in this process or on servers, plain Hugging Face generation elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch

from aipo.config.sections import RolloutConfig
from aipo.errors import UserError
from aipo.rollout.base import Completion, Request, RolloutEngine, Sampling
from aipo.rollout.hf import HfEngine
from aipo.rollout.vllm import INSTALL, VllmEngine

__all__ = ["Completion", "Request", "RolloutEngine", "Sampling", "make_engine", "memory_options", "require_engine"]

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


def memory_options(rollout: RolloutConfig, device: torch.device) -> dict[str, Any]:
    """What the engine of a config may take on a device, as options of :func:`make_engine`."""
    if rollout.engine != "vllm":
        return {}
    cache = None if device.type == "cuda" else rollout.kv_cache_gb
    return {"gpu_memory_utilization": rollout.gpu_memory_utilization, "kv_cache_gb": cache}
