"""The reward of a completion: correctness, format and length, each in [0, 1], weighted."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from aipo.config.sections import RewardConfig
from aipo.verify import Verdict, Verifier, after_thinking, extract_answer, last_box

NO_VERDICT = (Verdict.TIMED_OUT, Verdict.KILLED)  # says nothing of the answer
Weights = tuple[float, float, float]  # correctness, format, length: none negative, sum 1 (the config checks it)


def soft_overlong(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4), in [-1, 0].

    Args:
        lengths: (B,) completion tokens.
        max_length: L_max, from where the punishment is -1.
        buffer: L_c, the tokens before L_max over which it falls from 0; 0 makes it a step behind L_max.
    """
    if buffer == 0:
        return -(lengths > max_length).float()  # (B,)
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)  # (B,)


def well_formed(text: str, *, kind: str = "math", thinking: bool = False) -> bool:
    """Whether the answer stands where it was asked for, right or wrong.

    math: a complete ``\\boxed{}`` behind the thinking block; choice: a letter in a box or an ``Answer:`` line.
    With ``thinking`` there must also be exactly one closed block; its ``<think>`` may be part of the prompt.
    """
    if thinking:
        opened, closed = text.count("<think>"), text.count("</think>")
        if closed != 1 or opened > 1 or text.find("<think>") > text.find("</think>"):
            return False
    if kind == "choice":
        return extract_answer(text, kind) is not None
    return bool((last_box(after_thinking(text) or "") or "").strip())


def combine(correct: Tensor, format: Tensor, length: Tensor, weights: Weights, *, signed: bool = False) -> Tensor:
    """(B,) parts in [0, 1] -> (B,) float rewards, again in [0, 1] if no weight is negative and their sum is 1.

    ``signed`` counts a wrong answer as -1 instead of 0 (DAPO).
    """
    right = 2 * correct.float() - 1 if signed else correct.float()
    return weights[0] * right + weights[1] * format.float() + weights[2] * length.float()


@dataclass(frozen=True)
class Pending:
    """A rollout that was handed in and waits for its verdict."""

    verdict: Future[Verdict]
    formed: bool
    length: int  # completion tokens


class Rewarder:
    """Scores rollouts: all at once (:meth:`score`), or while generation runs (:meth:`submit`, then :meth:`collect`).

    Args:
        max_tokens: L_max of :func:`soft_overlong`.
        thinking: whether a thinking block is expected, for the format reward.
    """

    def __init__(self, config: RewardConfig, *, max_tokens: int, thinking: bool = False) -> None:
        self.config, self.max_tokens, self.thinking = config, max_tokens, thinking
        self.weights = config.correctness, config.format, config.length
        self.verifier = Verifier(config.workers, config.timeout_s, config.memory_mb)

    def submit(self, gold: str, kind: str, text: str, length: int) -> Pending:
        """Hand in a rollout; returns at once what to wait for. ``length`` is in completion tokens."""
        return Pending(
            self.verifier.submit(gold, text, kind), well_formed(text, kind=kind, thinking=self.thinking), length
        )

    def collect(self, pending: Sequence[Pending]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Wait for B rollouts that were handed in.

        Returns ``(rewards (B,) float, correct (B,) bool, metrics)`` in their order. An answer without a
        verdict (its check took too long, or too much memory) is not wrong: its reward is NaN. Metrics are means over
        the rollouts judged, and shares of all. Raises RuntimeError if no verifier process can be started.
        """
        if not pending:
            raise ValueError("no rollout was handed in")
        verdicts = [each.verdict.result() for each in pending]
        judged = torch.tensor([verdict not in NO_VERDICT for verdict in verdicts])  # (B,) bool
        correct = torch.tensor([verdict.correct for verdict in verdicts])  # (B,) bool
        formed = torch.tensor([each.formed for each in pending])  # (B,) bool
        lengths = torch.tensor([each.length for each in pending])  # (B,)
        too_long = soft_overlong(lengths, self.max_tokens, self.config.overlong_buffer)  # (B,) in [-1, 0]
        length = 1.0 + too_long  # (B,) in [0, 1]
        rewards = combine(correct, formed, length, self.weights, signed=self.config.signed)  # (B,)
        rewards = (rewards + self.config.overlong * too_long).where(judged, torch.nan)
        metrics = {
            "reward/mean": rewards.nanmean().item(),
            "reward/correct": correct[judged].float().mean().item(),
            "reward/format": formed.float().mean().item(),
            "reward/length": length.mean().item(),
        }
        for verdict in (Verdict.NO_ANSWER, Verdict.TIMED_OUT, Verdict.KILLED):
            metrics[f"reward/{verdict.value}"] = verdicts.count(verdict) / len(verdicts)
        return rewards, correct, metrics

    def score(
        self, golds: list[str], kinds: list[str], texts: list[str], lengths: list[int]
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """:meth:`submit` of B rollouts and :meth:`collect`."""
        return self.collect([self.submit(*rollout) for rollout in zip(golds, kinds, texts, lengths, strict=True)])

    def close(self) -> None:
        """Kill the verifier's workers."""
        self.verifier.close()
