"""Do the engine's weights follow the trainer's? Asked of log-probabilities, because tensors can compare equal while
the engine computes with a stale packed copy (vLLM on CPU does so with tied heads)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from aipo.config.training import GuardsConfig
from aipo.distributed import gather_objects
from aipo.errors import UserError
from aipo.layout import TokenIds
from aipo.rollout.base import Request, RolloutEngine, Sampling

Weights = Iterable[tuple[str, torch.Tensor]]
Logprobs = Callable[[Sequence[int], Sequence[int], float], Sequence[float]]
"""(prompt ids, completion ids, temperature) -> log-probability of each completion token"""

TOLERANCE = 0.08
"""Largest mean difference in nats between a bf16 engine and the trainer on the same weights.

Measured against fp32: 0.004 (SmolLM2-135M), 0.01-0.04 (random tiny models). One stale projection among SmolLM2's 30
layers makes 0.2-1.9, a stale tied head 1.5-17.
"""

DRAWN = 16
"""Tokens of a completion, at most, that are compared."""

NOISE_ELEMENTS = 2**22
"""Elements of a weight that are there in float32 at one time, while it is perturbed."""


def perturbed(weights: Weights, *, seed: int = 0, strength: float = 1.0) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor plus Gaussian noise as large, in root mean square, as ``strength`` times the tensor itself.

    The noise is a function of the seed, the tensor's place in the stream and its shape. The tensors themselves stay as
    they are, since an engine may hold them back until a layer is complete.
    """
    for i, (name, tensor) in enumerate(weights):
        yield name, _noisy(tensor, torch.Generator(tensor.device).manual_seed(seed * 1_000_003 + i), strength)


@torch.no_grad()
def _noisy(tensor: torch.Tensor, generator: torch.Generator, strength: float) -> torch.Tensor:
    """A copy in the tensor's dtype, to which noise is added in place and piece by piece: the largest weight of a large
    model fits beside a sync once, not four times in float32."""
    noisy = tensor.clone(memory_format=torch.contiguous_format)
    pieces = noisy.view(-1).split(NOISE_ELEMENTS)
    square = sum(float(torch.linalg.vector_norm(piece, dtype=torch.float32)) ** 2 for piece in pieces)
    scale = strength * (square / tensor.numel()) ** 0.5
    for piece in pieces:
        piece.add_(torch.randn(len(piece), generator=generator, device=piece.device), alpha=scale)
    return noisy


def logprob_gap(engine_logprobs: Sequence[float], trainer_logprobs: Sequence[float]) -> float:
    """Mean absolute difference in nats over the tokens drawn; NaN where there are none."""
    a, b = torch.tensor(engine_logprobs), torch.tensor(trainer_logprobs)
    return (a - b).abs().mean().item()


def engine_gap(engine: RolloutEngine, logprobs: Logprobs, prompts: TokenIds, *, seed: int = 0) -> float:
    """Mean absolute difference in nats between what the engine says of tokens that it draws and what the trainer says.

    A collective: one ``logprobs`` call a prompt on every rank. Where the engine can sleep it does so before the first
    of them, for the sake of memory, and afterwards wants a ``sync``.

    Returns:
        The largest among ranks, the same on all; NaN if it is that on any.
    """
    requests = [Request(prompt, seed + i) for i, prompt in enumerate(prompts)]
    completions = engine.generate(requests, Sampling(max_tokens=DRAWN))
    engine.sleep()
    drawn = [x for c in completions for x in c.logprobs]
    expected = [x for p, c in zip(prompts, completions) for x in logprobs(p, c.token_ids, 1.0)]
    return float(torch.tensor(gather_objects(logprob_gap(drawn, expected))).max())  # of NaN, too


def check_weight_sync(
    engine: RolloutEngine, weights: Callable[[], Weights], logprobs: Logprobs, prompts: TokenIds, *, seed: int = 0
) -> float:
    """Sync strongly perturbed weights, then the true ones, and compare what the engine then draws with the trainer.

    Every rank makes the same calls: two passes over ``weights()`` and one ``logprobs`` call a prompt, so both may be
    collectives. Where the engine can sleep it does so between them, as in training, and afterwards
    (:func:`engine_gap`). Build the engine with ``load_weights=False``: weights that are right from the start hide that
    they never arrive.

    Args:
        weights: the trainer's ``(name, full tensor)`` pairs.
        logprobs: of the trainer.
        prompts: token ids of a few prompts.

    Returns:
        The largest mean difference among ranks.

    Raises:
        UserError: on every rank, if it is above :data:`TOLERANCE` on any.
    """
    engine.sync(perturbed(weights(), seed=seed))
    engine.sleep()  # its KV cache leaves no room for a sync
    engine.sync(weights())
    worst = engine_gap(engine, logprobs, prompts, seed=seed)
    if not worst <= TOLERANCE:  # so written that NaN fails
        raise UserError(
            f"the rollout engine does not follow the trained weights: after a sync its log-probabilities differ by "
            f"{worst:.2f} nats on average from the trainer's (at most {TOLERANCE} expected); "
            f"try the other engine (vllm or hf) or another vLLM version"
        )
    return worst


def lost_weights(gap: float, step: int, every: int, saved: Path) -> str:
    """What a run says that stops because its engine no longer has the trained weights."""
    return (
        f"after step {step} the rollout engine's log-probabilities differ by {gap:.2f} nats on average from the "
        f"policy's (at most {TOLERANCE} expected): it no longer has the trained weights, and up to {every} steps were "
        f"trained on what it drew. The policy is saved in {saved}: go on from there with --resume auto, or from an "
        "earlier checkpoint with --resume PATH"
    )


class GapGuard:
    """Says of a step that the engine drew from another policy than was trained, and when to stop of it.

    Args:
        apart: whether it is meant to, as with ``branch.latent``; then nothing is said.
    """

    def __init__(self, guards: GuardsConfig, *, apart: bool = False) -> None:
        self.most, self.patience = math.inf if apart else guards.max_gap, guards.max_bad_steps
        self.beyond = 0  # steps in a row

    def ends(self, step: int, gap: float, say: Callable[[str], None]) -> bool:
        """Whether the run must stop after this step, whose ``gap`` is in nats a token. ``say`` prints a line."""
        if gap <= self.most:  # so written that NaN is beyond
            self.beyond = 0
            return False
        self.beyond += 1
        say(
            f"advice: in step {step} engine and policy differ by {gap:.2f} nats a token (mismatch/gap; guards.max_gap "
            f"is {self.most}): what is trained is not what was drawn"
        )
        return self.beyond >= self.patience

    def why(self, saved: Path) -> str:
        """What the run says that stops."""
        return (
            f"engine and policy differed by more than guards.max_gap ({self.most} nats a token) in {self.beyond} steps "
            f"in a row. The policy is saved in {saved}. Try, in a run of another name, optim.share_prompts=false, "
            "optim.packing=false, a lower optim.lr, rollout.async_depth=0 or the other engine"
        )
