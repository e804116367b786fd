"""What a rollout engine is: token ids in, completions with sampling log-probabilities out.

An engine owns its own copy of the weights. Under ZeRO-3 a forward of the training module is a collective
whose number of calls would depend on the data, so engines never touch the training module (they generate
through a path that gathers nothing); the trainer pushes new weights with :meth:`RolloutEngine.sync`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Literal, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from aipo.config.sections import RolloutConfig
from aipo.rollout.interventions import Intervention

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How to draw completions. ``temperature`` 0 is greedy; ``top_k`` -1 and ``min_p`` 0 are off.

    ``intervention`` changes the model's distribution before all of these.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    intervention: Intervention | None = None

    @staticmethod
    def of(config: RolloutConfig) -> Sampling:
        """As in training."""
        return Sampling(config.max_tokens, config.temperature, config.top_p, config.top_k)


@dataclass(frozen=True)
class Request:
    """One completion to draw: a prompt's token ids, the seed of its own random stream, and its own length limit.

    ``max_tokens`` None is :attr:`Sampling.max_tokens`.
    """

    prompt_ids: Sequence[int]
    seed: int
    max_tokens: int | None = None


@dataclass(frozen=True)
class Completion:
    """Token ids with the end token, if it was drawn, and the log-probability of each.

    ``logprobs`` are those of the distribution that was drawn from: after intervention, temperature, top-k, top-p and
    min-p. Greedy tokens get those at temperature 1; a forced token has 0.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


OnDone = Callable[[int, Completion], None] | None
"""called with the place of a request among all and its completion, in any order"""


class Stopped(Exception):
    """A draw was ended before its time."""


class RolloutEngine(Protocol):
    """``generate`` keeps the order of its requests; identical prompts of one call share their prefill."""

    asleep: bool
    """between ``sleep`` and the next ``sync`` where sleeping frees memory; it must not be asked for anything then"""

    def generate(self, requests: Sequence[Request], sampling: Sampling, *, on_done: OnDone = None) -> list[Completion]:
        """Draw every request; ``on_done(i, completion)`` is called as each one finishes.

        Raises ``ValueError`` if a prompt and ``max_tokens`` together do not fit the engine's context, or if
        ``sampling`` has an intervention and the engine was built without ``interventions=True``.
        """
        ...

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights by ``(Hugging Face name, full tensor)`` pairs and forget cached prefixes.

        The iterable is consumed once, to its end (under ZeRO-3 each item is a collective); no tensor may change
        before that (vLLM holds some back until their layer is complete). Raises ``ValueError`` if a weight is missing.
        """
        ...

    def sleep(self) -> None:
        """Free accelerator memory for the training phase; the next ``sync`` wakes the engine."""
        ...

    stopped: Event
    """once set, a draw under way on another thread ends at its next token with :class:`Stopped`"""

    def close(self) -> None: ...


def check_requests(requests: Sequence[Request], sampling: Sampling, *, max_model_len: int, interventions: bool) -> None:
    """Raise ``ValueError`` for a request that is empty or does not fit the context, or an intervention not provided
    for when the engine was built."""
    if sampling.intervention is not None and not interventions:
        raise ValueError("this engine was built without interventions=True, so it cannot intervene")
    for i, request in enumerate(requests):
        length = len(request.prompt_ids)
        if length == 0:
            raise ValueError(f"request {i} has an empty prompt")
        new = request.max_tokens or sampling.max_tokens
        if length + new > max_model_len:
            raise ValueError(
                f"request {i}: a prompt of {length} tokens and {new} new ones exceed "
                f"the engine's context of {max_model_len}"
            )


def parameter_names(config: PretrainedConfig) -> frozenset[str]:
    """Hugging Face names of a causal LM's parameters, without the alias that a tied head would be."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return frozenset(name for name, _ in model.named_parameters())


def check_complete(given: Iterable[str], expected: Iterable[str]) -> None:
    """Raise ``ValueError`` naming the first weights that a ``sync`` did not bring."""
    if missing := sorted(set(expected) - set(given)):
        raise ValueError(f"sync brought no {', '.join(missing[:3])} ({len(missing)} weights missing)")


@contextmanager
def keep_rng() -> Iterator[None]:
    """Restore the random states of python, numpy and torch (CPU and the current GPU) on leaving."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
