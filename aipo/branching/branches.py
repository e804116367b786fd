"""Entropy-triggered branching and the information-bottleneck filter of IIB-LPO (arXiv 2601.05870; METHODS section 9).

Collect a few base rollouts, cut each where the policy hesitated, draw its rest anew until every question has its
quota, and keep the trajectories that say most about the answer and least about the question. Pure functions: the
engine is called between :func:`plan_branches` and :func:`join_branches`, with or without a latent
(:mod:`aipo.branching.latent`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from aipo.layout import token_grid
from aipo.rollout.base import Completion, Request
from aipo.rollout.collect import request_seed
from aipo.rollouts import Rollouts

Pick = Literal["uniform", "argmax"]
TOP_FRACTION = 0.05


@dataclass(frozen=True)
class Branch:
    """Row ``parent`` of the base rollouts, cut before its token ``cut``; ``request`` draws the rest."""

    parent: int
    cut: int
    request: Request


def branch_point(signal: Sequence[float], *, fraction: float = TOP_FRACTION, pick: Pick = "uniform", seed: int) -> int:
    """t*: where a rollout is cut; its tokens before t* are kept.

    Args:
        signal: (T,) entropy or surprisal of each token, T at least 1.
        fraction: the candidates are the ``floor(fraction * T)`` positions of the highest signal, at least one; of
            equals the earlier.
        pick: ``uniform`` among the candidates, or ``argmax``.
        seed: of the uniform draw.

    Raises:
        ValueError: for an empty rollout.
    """
    if not len(signal):
        raise ValueError("a rollout without tokens has no branch point")
    ranked = sorted(range(len(signal)), key=lambda t: -signal[t])  # stable
    candidates = ranked[: max(int(fraction * len(signal)), 1)]
    return candidates[0] if pick == "argmax" else random.Random(seed).choice(candidates)


def plan_branches(
    base: Rollouts,
    signal: Tensor,
    *,
    samples: int,
    max_tokens: int,
    fraction: float = TOP_FRACTION,
    pick: Pick = "uniform",
    seed: int,
    stream: str,
) -> list[Branch]:
    """The branches that fill every question up to ``samples`` rollouts; a question's base rollouts take turns.

    Args:
        base: ``group_size`` is the number of base rollouts a question.
        signal: (B, T) entropy of the policy, or surprisal ``-base.logp_engine``; only completion tokens are looked at.
        samples: rollouts a question in all.
        max_tokens: longest whole completion; a branch may draw what its prefix has left of it.
        seed, stream: of the run and of the step, as in :meth:`aipo.rollout.collect.Collector.collect`; cut and
            continuation are random by (seed, stream, question, sample) alone, whatever the number of ranks.

    Returns:
        Q * (samples - group_size) branches, those of one question adjacent.

    Raises:
        ValueError: if there are no fewer base rollouts than ``samples``.
    """
    n = base.group_size
    if not 0 < n < samples:
        raise ValueError(f"{n} base rollouts a question leave nothing to branch for {samples} in all")
    branches = []
    for q, (problem, prompt) in enumerate(zip(base.problems, base.prompts, strict=True)):
        for sample in range(n, samples):
            parent = q * n + (sample - n) % n
            tokens = base.completions[parent].token_ids
            cut = branch_point(
                signal[parent, : len(tokens)].tolist(),
                fraction=fraction,
                pick=pick,
                seed=request_seed(seed, f"{stream} cut", problem.id, sample),
            )
            request = Request(
                [*prompt, *tokens[:cut]], request_seed(seed, stream, problem.id, sample), max_tokens - cut
            )
            branches.append(Branch(parent, cut, request))
    return branches


def join(base: Completion, cut: int, rest: Completion) -> Completion:
    """The first ``cut`` tokens of ``base`` with its own log-probabilities, then ``rest``, which also says how it
    ended."""
    return Completion(
        base.token_ids[:cut] + rest.token_ids, base.logprobs[:cut] + rest.logprobs, finish_reason=rest.finish_reason
    )


def join_branches(
    base: Rollouts,
    branches: Sequence[Branch],
    continuations: Sequence[Completion],
    decode: Callable[[list[int]], str],
) -> Rollouts:
    """Base rollouts and branches as one batch, each question's base rollouts first; not judged yet.

    Args:
        continuations: what the engine drew for each branch's request.
        decode: completion token ids to text, for the branches.
    """
    questions = len(base.problems)
    more = len(branches) // max(questions, 1)
    completions, texts, ids = [], [], []
    for q in range(questions):
        own = range(q * base.group_size, (q + 1) * base.group_size)
        completions += [base.completions[i] for i in own]
        texts += [base.texts[i] for i in own]
        ids += [int(base.ids[i]) for i in own]
        for b in range(q * more, (q + 1) * more):
            branch = branches[b]
            whole = join(base.completions[branch.parent], branch.cut, continuations[b])
            completions.append(whole)
            texts.append(decode(whole.token_ids))
            ids.append(branch.request.seed)
    return replace(
        base,
        completions=completions,
        texts=texts,
        ids=torch.tensor(ids, dtype=torch.long),
        group_size=base.group_size + more,
        rewards=torch.empty(0),
        correct=torch.empty(0),
        advantages=torch.empty(0),
        used=torch.empty(0),
    )


# -- the filter ------------------------------------------------------------------------------------------------------


def mean_log_prob(logp: Tensor, lengths: Tensor) -> Tensor:
    """(B, T) -> (B,): nats a token over the first ``lengths`` (B,) tokens, 0 for none."""
    grid = token_grid(lengths, logp.shape[1])  # (B, T)
    return logp.where(grid, 0).sum(-1) / lengths.clamp(min=1)


def bottleneck_scores(
    answer_after: Tensor, answer_before: Tensor, with_question: Tensor, without_question: Tensor, *, beta: float
) -> Tensor:
    """I(r; a) - beta * I(q; r) of each trajectory; higher is better, nats a token.

    The sources name the two informations and not their estimates; these are our reading, pointwise and from the
    policy's own log-probabilities, so that they need no further model:

        I(r; a) = [log p(a | q, r) - log p(a | q)] / |a|    how much r helps to say the gold answer
        I(q; r) = [log p(r | q) - log p(r)] / |r|           how much of r is owed to the wording of the question

    Each is a pointwise mutual information, whose mean over rollouts is the information. It is taken per token, or long
    trajectories and long answers would win or lose by their length alone.

    Args:
        answer_after: (B,) mean log-probability of the gold answer's tokens after question and trajectory.
        answer_before: (B,) the same after the question alone.
        with_question: (B,) mean log-probability of the trajectory's tokens after the question.
        without_question: (B,) the same after the prompt with the question left out.
        beta: weight of compression; 0 keeps what helps the answer most.

    Returns:
        (B,)
    """
    return (answer_after - answer_before) - beta * (with_question - without_question)


def keep_best(scores: Tensor, group_size: int, keep: int) -> Tensor:
    """(B,) -> (B,) bool: the ``keep`` best of each group of ``group_size`` neighbours; of equals the earlier.

    Raises:
        ValueError: if ``keep`` is not between 1 and ``group_size``.
    """
    if not 1 <= keep <= group_size:
        raise ValueError(f"cannot keep {keep} of {group_size} rollouts a question")
    order = scores.reshape(-1, group_size).argsort(dim=-1, descending=True, stable=True)  # (Q, group_size)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[:, :keep], True)  # (Q, group_size)
    return kept.flatten()
