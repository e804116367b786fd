"""The reward of a completion: correctness (or what a function of the user's says), format and length, weighted."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aipo.config.data import VERIFIER
from aipo.config.sections import RewardConfig
from aipo.errors import TrainingError
from aipo.problems.problem import Problem
from aipo.verify import FunctionError, Outcome, Verdict, Verifier, after_thinking, extract_answer, last_box

NO_VERDICT = (Verdict.TIMED_OUT, Verdict.KILLED)  # says nothing of the answer
SAY_S = 60  # seconds of waiting after which a word is said
Weights = tuple[float, float, float]  # correctness, format, length: none negative, sum 1 (the config checks it)


def soft_overlong(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4), in [-1, 0].

    Args:
        lengths: (B,) completion tokens.
        max_length: L_max, from where the punishment is -1.
        buffer: L_c, the tokens before L_max over which it falls from 0; at least 1.
    """
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
    """(B,) parts in [0, 1] -> (B,) float rewards, again in [0, 1] if no weight is negative and their sum is 1,
    but for ``signed``.

    ``correct`` may be the numbers of a reward function. ``signed`` counts a wrong answer as -1 instead of 0 (DAPO).
    """
    right = 2 * correct.float() - 1 if signed else correct.float()
    return weights[0] * right + weights[1] * format.float() + weights[2] * length.float()


@dataclass(frozen=True)
class Pending:
    """A rollout that was handed in and waits for what is said of it."""

    outcome: Future[Any]  # of an Outcome
    formed: bool
    length: int  # completion tokens
    config: RewardConfig
    rollout: str  # which one it is, for an error


class Rewarder:
    """Scores rollouts while generation runs: :meth:`submit` each, then :meth:`collect`.

    Args:
        configs: by the origin of a problem; ``""`` is for all others.
        max_tokens: L_max of :func:`soft_overlong`.
        thinking: whether a thinking block is expected, for the format reward.
    """

    def __init__(self, configs: Mapping[str, RewardConfig], *, max_tokens: int, thinking: bool = False) -> None:
        self.configs, self.max_tokens, self.thinking = configs, max_tokens, thinking
        self.verifier = Verifier(configs[""].workers, configs[""].timeout_s, configs[""].memory_mb)

    def submit(self, problem: Problem, text: str, length: int, sample: int = 0) -> Pending:
        """Hand in a rollout; returns at once what to wait for. ``length`` is in completion tokens."""
        config = self.configs.get(problem.origin, self.configs[""])
        outcome: Future[Any] = (
            self.verifier.submit(problem.answer, text, problem.kind)
            if config.function == VERIFIER
            else self.verifier.call(config.function, problem, text)
        )
        formed = well_formed(text, kind=problem.kind, thinking=self.thinking)
        return Pending(outcome, formed, length, config, f"sample {sample + 1} of question {problem.id}")

    def collect(self, pending: Sequence[Pending]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Wait for B rollouts that were handed in.

        Returns ``(rewards (B,) float, correct (B,) bool, metrics)`` in their order. An answer without a
        verdict (its check took too long, or too much memory) is not wrong: its reward is NaN. ``reward/mean`` and
        ``reward/correct`` are means over the rollouts judged, the other metrics over all. Raises RuntimeError if no
        verifier process can be started, and TrainingError with the rollout where a reward function raised.
        """
        if not pending:
            raise ValueError("no rollout was handed in")
        futures = {each.outcome for each in pending}
        while left := wait(futures, timeout=SAY_S).not_done:
            print(f"waiting for the verdicts of {len(left)} answers", file=sys.stderr, flush=True)
        outcomes = [_outcome(each) for each in pending]
        judged = torch.tensor([outcome not in NO_VERDICT for outcome in outcomes])  # (B,) bool
        scores = torch.tensor([_score(outcome) for outcome in outcomes])  # (B,)
        formed = torch.tensor([each.formed for each in pending])  # (B,) bool
        lengths = torch.tensor([each.length for each in pending])  # (B,)
        correct = scores >= 1  # (B,) bool
        rewards, length = torch.empty(len(pending)), torch.empty(len(pending))  # (B,) each
        for config in dict.fromkeys(each.config for each in pending):
            rows = torch.tensor([each.config == config for each in pending])  # (B,) bool
            too_long = soft_overlong(lengths[rows], self.max_tokens, config.overlong_buffer)  # (b,) in [-1, 0]
            length[rows] = 1.0 + too_long  # in [0, 1]
            weights = config.correctness, config.format, config.length
            parts = combine(scores[rows], formed[rows], length[rows], weights, signed=config.signed)  # (b,)
            rewards[rows] = parts + config.overlong * too_long
        rewards = rewards.where(judged, torch.nan)
        metrics = {
            "reward/mean": rewards.nanmean().item(),
            "reward/correct": correct[judged].float().mean().item(),
            "reward/format": formed.float().mean().item(),
            "reward/length": length.mean().item(),
            "verdicts": float(judged.sum()),  # behind the first two: what they count for among ranks
        }
        for verdict in (Verdict.NO_ANSWER, Verdict.TIMED_OUT, Verdict.KILLED):
            metrics[f"reward/{verdict.value}"] = outcomes.count(verdict) / len(outcomes)
        return rewards, correct, metrics

    def close(self) -> None:
        """Kill the verifier's workers."""
        self.verifier.close()


def _outcome(pending: Pending) -> Outcome:
    try:
        return pending.outcome.result()
    except FunctionError as error:
        function = pending.config.function
        raise TrainingError(f"reward.function: {function} failed on {pending.rollout}: {error}; mend it") from error


def _score(outcome: Outcome) -> float:
    return float(outcome.correct) if isinstance(outcome, Verdict) else outcome
