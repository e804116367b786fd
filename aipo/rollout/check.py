"""Do the engine's weights follow the trainer's? Asked of log-probabilities, because tensors can compare equal while
the engine computes with a stale packed copy (vLLM on CPU does so with tied heads)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from aipo.errors import UserError
from aipo.rollout.base import Request, RolloutEngine, Sampling

Weights = Iterable[tuple[str, torch.Tensor]]

TOLERANCE = 0.08
"""Largest mean difference in nats between a bf16 engine and the trainer on the same weights.

Measured against fp32: 0.004 (SmolLM2-135M), 0.01-0.04 (random tiny models). One stale projection among SmolLM2's 30
layers makes 0.2-1.9, a stale tied head 1.5-17.
"""


def perturbed(weights: Weights, *, seed: int = 0, strength: float = 1.0) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor plus Gaussian noise as large, in root mean square, as ``strength`` times the tensor itself.

    The noise is a function of the seed, the tensor's place in the stream and its shape.
    """
    for i, (name, tensor) in enumerate(weights):
        generator = torch.Generator(tensor.device).manual_seed(seed * 1_000_003 + i)
        noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
        scale = strength * tensor.float().square().mean().sqrt()
        yield name, (tensor.float() + scale * noise).to(tensor.dtype)


def logprob_gap(engine_logprobs: Sequence[float], trainer_logprobs: Sequence[float]) -> float:
    """Mean absolute difference in nats over the tokens drawn; NaN where there are none."""
    a, b = torch.tensor(engine_logprobs), torch.tensor(trainer_logprobs)
    return (a - b).abs().mean().item()


def check_weight_sync(
    engine: RolloutEngine,
    weights: Callable[[], Weights],
    logprobs: Callable[[Sequence[int], Sequence[int], float], Sequence[float]],
    prompts: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    max_tokens: int = 16,
    tolerance: float = TOLERANCE,
) -> float:
    """Sync strongly perturbed weights, then the true ones, and compare what the engine then draws with the trainer.

    Every rank makes the same calls: two passes over ``weights()`` and one ``logprobs`` call a prompt, so both may be
    collectives. Build the engine with ``load_weights=False``: weights that are right from the start hide that
    they never arrive.

    Args:
        weights: the trainer's ``(name, full tensor)`` pairs.
        logprobs: ``(prompt_ids, completion_ids, temperature)`` -> the trainer's log-probability of each completion
            token.
        prompts: token ids of a few prompts.
        tolerance: largest mean difference in nats.

    Returns:
        The largest mean difference among ranks.

    Raises:
        UserError: on every rank, if it is above the tolerance on any.
    """
    engine.sync(perturbed(weights(), seed=seed))
    engine.sync(weights())
    requests = [Request(prompt, seed + i) for i, prompt in enumerate(prompts)]
    completions = engine.generate(requests, Sampling(max_tokens=max_tokens))
    drawn = [x for c in completions for x in c.logprobs]
    expected = [x for p, c in zip(prompts, completions) for x in logprobs(p, c.token_ids, 1.0)]
    gaps: list[float] = [logprob_gap(drawn, expected)]
    if dist.is_initialized():
        gaps = gaps * dist.get_world_size()
        dist.all_gather_object(gaps, gaps[dist.get_rank()])
    worst = max(gaps)
    if not all(gap <= tolerance for gap in gaps):  # so written that NaN fails
        raise UserError(
            f"the rollout engine does not follow the trained weights: after a sync its log-probabilities differ by "
            f"{worst:.2f} nats on average from the trainer's (at most {tolerance} expected); "
            f"try the other engine (vllm or hf) or another vLLM version"
        )
    return worst
