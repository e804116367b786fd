"""Rollout engines: vLLM where it runs, plain Hugging Face generation elsewhere, behind one interface."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from aipo.errors import UserError
from aipo.rollout.base import Completion, Request, RolloutEngine, Sampling
from aipo.rollout.hf import HfEngine
from aipo.rollout.vllm import INSTALL, VllmEngine

__all__ = ["Completion", "Request", "RolloutEngine", "Sampling", "make_engine", "require_engine"]

EngineKind = Literal["vllm", "hf"]


def require_engine(kind: EngineKind) -> None:
    """Raise :class:`UserError` if the engine's library is not installed; imports nothing, so it is quick."""
    if kind == "vllm" and find_spec("vllm") is None:
        raise UserError(f"the rollout engine 'vllm' is not installed: {INSTALL}")


def make_engine(kind: EngineKind, model_path: str, **options: Any) -> RolloutEngine:
    """Build an engine; ``options`` are the keyword arguments of its class.

    Raises :class:`UserError` if vLLM is wanted and cannot be imported.
    """
    require_engine(kind)
    engine = {"vllm": VllmEngine, "hf": HfEngine}[kind]
    return engine(model_path, **options)
