"""Entropy-triggered branching and the information-bottleneck filter of IIB-LPO (arXiv 2601.05870).

Collect a few base rollouts, cut each where the policy hesitated, draw its rest anew until every question has its
quota, and keep the trajectories that say most about the answer and least about the question. With several rounds the
branches branch in turn. The engine is called between :meth:`Paths.plan` and :meth:`Paths.join`, with or without a
latent (:mod:`aipo.branching.latent`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from aipo.config.sections import BranchConfig
from aipo.layout import token_grid
from aipo.rollout.base import Completion, Request
from aipo.rollout.collect import request_seed
from aipo.rollouts import Lineage, Rollouts


@dataclass(frozen=True)
class Branch:
    """Row ``parent`` of the rollouts, cut behind its first ``cut`` tokens; ``request`` draws the rest."""

    parent: int
    cut: int
    request: Request


def branch_point(signal: Sequence[float], branch: BranchConfig, *, seed: int) -> int:
    """t*: the token where a rollout is cut.

    Args:
        signal: (T,) entropy or surprisal of each token, T at least 1.
        branch: the candidates are the ``floor(fraction * T)`` positions of the highest signal, at least one; of equals
            the earlier. ``pick`` is ``uniform`` among them, or ``argmax``.
        seed: of the uniform draw.

    Raises:
        ValueError: for an empty rollout.
    """
    if not len(signal):
        raise ValueError("a rollout without tokens has no branch point")
    ranked = sorted(range(len(signal)), key=lambda t: -signal[t])  # stable
    candidates = ranked[: max(int(branch.fraction * len(signal)), 1)]
    return candidates[0] if branch.pick == "argmax" else random.Random(seed).choice(candidates)


def kept_tokens(signal: Sequence[float], branch: BranchConfig, *, seed: int) -> int:
    """How many of its T tokens a path keeps in a branch: up to t*, without or with it; arguments as of
    :func:`branch_point`.

    ``branch.cut: before`` draws t* anew too; ``after`` keeps it. Then the last token, behind which there is nothing to
    draw, is no t*; a path of one token is drawn anew. The first ``branch.skip`` tokens are no t*, if there are others.
    """
    kept = int(branch.cut == "after")
    last = len(signal) - kept
    if last < 1:
        return 0
    first = min(branch.skip, last - 1)
    return first + branch_point(signal[first:last], branch, seed=seed) + kept


def branches_by_round(base: int, samples: int, rounds: int) -> list[int]:
    """How many branches a question gets in each round.

    Its ``base`` paths take turns until there are ``samples`` rollouts, and the turns are spread over the rounds: with
    as many rounds as turns, a path has one branch a round, as in the authors' code.

    Raises:
        ValueError: if there are no fewer base rollouts than ``samples``, or fewer turns than rounds.
    """
    if not 0 < base < samples:
        raise ValueError(f"{base} base rollouts a question leave nothing to branch for {samples} in all")
    turns = -(-(samples - base) // base)
    if not 0 < rounds <= turns:
        raise ValueError(f"{samples - base} branches of {base} base rollouts are {turns} turns, not {rounds} rounds")
    counts = [0] * rounds
    for branch in range(samples - base):
        counts[branch // base * rounds // turns] += 1
    return counts


class Paths:
    """The rollouts of some questions while they branch, and from which of them each path branches next.

    Args:
        base: ``group_size`` is the number of base rollouts, and of paths, a question; not judged.
        signal: (B, T) entropy of the policy, or surprisal ``-base.logp_engine``; only completion tokens are looked at.
        max_tokens: longest whole completion; a branch may draw what its prefix has left of it.
        seed, stream: of the run and of the step, as in :meth:`aipo.rollout.collect.Collector.collect`; cut and
            continuation are random by (seed, stream, question, sample) alone, whatever the number of ranks.

    Attributes:
        rollouts: each question's base rollouts, then its branches in the order drawn; with their lineage.
    """

    def __init__(
        self, base: Rollouts, signal: Tensor, branch: BranchConfig, *, max_tokens: int, seed: int, stream: str
    ) -> None:
        ids, lengths = base.ids.tolist(), base.lengths.tolist()
        self.rollouts = replace(base, lineage=[((i, n),) for i, n in zip(ids, lengths)])
        self.count = base.group_size
        self.own = {i: values[:n] for i, values, n in zip(ids, signal.tolist(), lengths)}  # of what each drew itself
        self.active = [list(range(self.count)) for _ in base.problems]  # of each question, the sample each path is at
        self.branch, self.max_tokens, self.seed, self.stream = branch, max_tokens, seed, stream

    def plan(self, count: int) -> list[Branch]:
        """``count`` branches of every question, those of one adjacent; its paths take turns."""
        n, rollouts = self.rollouts.group_size, self.rollouts
        branches = []
        for q, (problem, prompt) in enumerate(zip(rollouts.problems, rollouts.prompts, strict=True)):
            for sample in range(n, n + count):
                parent = q * n + self.active[q][(sample - self.count) % self.count]
                tokens, own = rollouts.completions[parent].token_ids, self.own[int(rollouts.ids[parent])]
                seed = request_seed(self.seed, f"{self.stream} cut", problem.id, sample)
                keep = len(tokens) - len(own) + kept_tokens(own, self.branch, seed=seed)
                seed = request_seed(self.seed, self.stream, problem.id, sample)
                branches.append(Branch(parent, keep, Request([*prompt, *tokens[:keep]], seed, self.max_tokens - keep)))
        return branches

    def join(
        self, branches: Sequence[Branch], continuations: Sequence[Completion], decode: Callable[[list[int]], str]
    ) -> Rollouts:
        """Put what the engine drew for each branch's request into :attr:`rollouts`. The branches alone, as a batch.

        Args:
            decode: completion token ids to text.
        """
        old, n, questions = self.rollouts, self.rollouts.group_size, len(self.rollouts.problems)
        more = len(branches) // max(questions, 1)
        whole = [join(old.completions[b.parent], b.cut, rest) for b, rest in zip(branches, continuations, strict=True)]
        begun = [cut_lineage(old.lineage[b.parent], b.cut) for b in branches]
        new = replace(
            old,
            completions=whole,
            texts=[decode(each.token_ids) for each in whole],
            ids=torch.tensor([b.request.seed for b in branches], dtype=torch.long),
            group_size=more,
            lineage=[(*of, (b.request.seed, len(each.token_ids))) for of, b, each in zip(begun, branches, whole)],
        )

        def grouped(first: Sequence[Any], then: Sequence[Any]) -> list[Any]:
            groups = [(*first[q * n : (q + 1) * n], *then[q * more : (q + 1) * more]) for q in range(questions)]
            return [each for group in groups for each in group]

        self.rollouts = replace(
            old,
            completions=grouped(old.completions, new.completions),
            texts=grouped(old.texts, new.texts),
            ids=torch.tensor(grouped(old.ids.tolist(), new.ids.tolist()), dtype=torch.long),
            group_size=n + more,
            lineage=grouped(old.lineage, new.lineage),
            extra_tokens=old.extra_tokens - sum(b.cut for b in branches),  # beginnings were not generated again
        )
        return new

    def go_on(self, new: Rollouts, signal: Tensor) -> None:
        """From now on a path branches from its newest branch if the policy was less sure in that.

        Compared are means over what each drew itself; of several branches of a path, the least sure.

        Args:
            new: the last that :meth:`join` returned; signal: (b, T) of these.
        """
        size, more = self.rollouts.group_size, new.group_size
        for row, (lineage, values) in enumerate(zip(new.lineage, signal.tolist())):
            start = lineage[-2][1] if len(lineage) > 1 else 0
            own = self.own[int(new.ids[row])] = values[start : lineage[-1][1]]
            question, sample = row // more, size - more + row % more
            path = (sample - self.count) % self.count
            now = int(self.rollouts.ids[question * size + self.active[question][path]])
            if fmean(own) > fmean(self.own[now]):
                self.active[question][path] = sample


def cut_lineage(lineage: Lineage, cut: int) -> Lineage:
    """Of the first ``cut`` tokens."""
    starts = [0, *(end for _, end in lineage)]
    return tuple((who, min(end, cut)) for (who, end), start in zip(lineage, starts) if start < cut)


def join(base: Completion, cut: int, rest: Completion) -> Completion:
    """The first ``cut`` tokens of ``base`` with its own log-probabilities, then ``rest``, which also says how it
    ended."""
    return Completion(
        base.token_ids[:cut] + rest.token_ids, base.logprobs[:cut] + rest.logprobs, finish_reason=rest.finish_reason
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
