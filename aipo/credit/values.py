"""The value of prefixes, V, by continuations at a frozen policy, and what each stretch of tokens changes of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aipo.errors import UserError
from aipo.problems.problem import Problem
from aipo.rollout.base import Completion, Sampling
from aipo.rollout.collect import Collector
from aipo.rollouts import Rollouts


@dataclass(frozen=True)
class Valued:
    """The judged rollouts of one question and, once they are valued, the values of their prefixes.

    ``cuts[i]`` are the lengths of prefixes of completion i, from 0 to its own length; ``values[i]`` their V.
    """

    question: str
    completions: list[Completion]
    judged: list[float]  # 1 right, 0 wrong, NaN without a verdict
    texts: list[str]
    cuts: list[list[int]] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)  # the last is ``judged``; NaN where no answer had a verdict

    @staticmethod
    def drawn(rollouts: Rollouts) -> Valued:
        """Of one question's judged rollouts, without values."""
        return Valued(rollouts.problems[0].id, rollouts.completions, rollouts.judged_correct.tolist(), rollouts.texts)

    @property
    def correct(self) -> list[bool]:
        return [right == 1 for right in self.judged]

    @property
    def mixed(self) -> bool:
        """Whether right ones are among them, and wrong ones."""
        return {0.0, 1.0} <= set(self.judged)

    def row(self) -> dict[str, Any]:
        """As a line of a log, which :meth:`of` reads."""
        plain = vars(self) | {"completions": [[c.token_ids, c.logprobs, c.finish_reason] for c in self.completions]}
        return dict(plain)

    @staticmethod
    def of(row: dict[str, Any]) -> Valued:
        completions = [Completion(*each) for each in row["completions"]]
        values = [_numbers(each) for each in row["values"]]
        judged = _numbers(row["judged"])
        return Valued(**(row | {"completions": completions, "judged": judged, "values": values}))

    def rollouts(self, problem: Problem, prompt: list[int]) -> Rollouts:
        return Rollouts(
            problems=[problem],
            prompts=[prompt],
            completions=self.completions,
            group_size=len(self.completions),
            ids=torch.arange(len(self.completions)),
            rewards=torch.tensor(self.judged),
            correct=torch.tensor(self.correct, dtype=torch.bool),
            texts=self.texts,
            advantages=torch.zeros(len(self.completions)),
            used=torch.ones(len(self.completions), dtype=torch.bool),
        )


def _numbers(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def cuts_of(length: int, stride: int) -> list[int]:
    """0, stride, 2 stride, ... and the whole length."""
    return [*range(0, length, stride), length]


def value_prefixes(
    collector: Collector, rollouts: Rollouts, sampling: Sampling, *, continuations: int, stride: int
) -> Valued:
    """V of the prefixes of one question's judged rollouts: the share of right answers among continuations.

    All prefixes are asked for at once, so that an engine with a prefix cache reads each token once; one that several
    rollouts begin with is asked for once.
    """
    cuts = [cuts_of(len(c.token_ids), stride) for c in rollouts.completions]
    first: dict[tuple[int, ...], tuple[int, int]] = {}  # rollout and cut that a prefix was met at
    for row, own in enumerate(cuts):
        for cut in own[:-1]:
            first.setdefault(tuple(rollouts.completions[row].token_ids[:cut]), (row, cut))
    pairs = list(first.values())
    # a rollout of the question for each prefix: every one then has random streams of its own
    expanded = Rollouts(
        problems=rollouts.problems,
        prompts=rollouts.prompts,
        completions=[rollouts.completions[row] for row, _ in pairs],
        group_size=len(pairs),
        ids=torch.arange(len(pairs)),
    )
    places = torch.tensor([cut for _, cut in pairs])  # (n,)
    right, _ = collector.continue_from(expanded, places, sampling, samples=continuations, stream="credit")  # (n,)
    found = dict(zip(first, (right / continuations).tolist()))
    values = [
        [*(found[tuple(completion.token_ids[:cut])] for cut in own[:-1]), last]
        for completion, own, last in zip(rollouts.completions, cuts, rollouts.judged_correct.tolist())
    ]
    return replace(Valued.drawn(rollouts), cuts=cuts, values=values)


def changes(values: Tensor, continuations: int) -> tuple[Tensor, Tensor]:
    """dV and its standard error from the values (n + 1,) of consecutive prefixes, the last being exact: (n,), (n,)."""
    variance = _variance(values, continuations)  # (n + 1,)
    variance[-1] = 0.0
    return values.double().diff(), (variance[1:] + variance[:-1]).sqrt()


def _variance(values: Tensor, continuations: int) -> Tensor:
    """Of shares v of K: p (1 - p) / K with p = (K v + 1/2) / (K + 1), so that K equal outcomes are not certainty."""
    p = (continuations * values.double() + 0.5) / (continuations + 1)
    return p * (1 - p) / continuations


def by_chance(values: Tensor, continuations: int) -> Tensor:
    """Probability that |dV| exceeds twice its standard error where V does not change: (n + 1,) -> (n,).

    Of two binomial shares of K at the mean of both values, exactly; 0 for the last stretch, whose end has no noise.
    """
    shares = torch.arange(continuations + 1, dtype=torch.float64) / continuations  # (K + 1,)
    variance = _variance(shares, continuations)  # (K + 1,)
    beyond = (shares[:, None] - shares).abs() > 2 * (variance[:, None] + variance).sqrt()  # (K + 1, K + 1)
    mean = (values.double()[1:] + values.double()[:-1]) / 2  # (n,)
    p = (2 * continuations * mean + 0.5) / (2 * continuations + 1)  # (n,)
    pmf = (
        torch.distributions.Binomial(continuations, p[:, None], validate_args=False)
        .log_prob(continuations * shares)
        .exp()
    )  # (n, K + 1)
    chance = torch.einsum("ni,ij,nj->n", pmf, beyond.double(), pmf)
    chance[-1] = 0.0
    return chance


def enough_continuations(continuations: int) -> None:
    """UserError where not even a change from 0 to 1 would exceed twice its standard error."""
    largest, error = changes(torch.tensor([0.0, 1.0, 1.0]), continuations)
    if not largest[0] > 2 * error[0]:
        raise UserError(
            f"--continuations: with {continuations} of them a token that takes the accuracy from 0 to 1 lies within "
            f"twice its noise ({2 * float(error[0]):.2f}): take 16 or more"
        )
