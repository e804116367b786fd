"""The one value that flows through a training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from aipo import distributed
from aipo.layout import pad
from aipo.problems.datasets import Problem
from aipo.reward import Pending
from aipo.rollout.base import Completion

BY_QUESTION, BY_ROLLOUT = {"by": "question"}, {"by": "rollout"}

Lineage = tuple[tuple[int, int], ...]
"""who drew a completion's tokens: (seed of a request, end of what it drew), in order; a branch begins as its parent"""


def _unset() -> Tensor:
    """What a later stage fills in."""
    return torch.empty(0)


@dataclass
class Rollouts:
    """B = Q * group_size completions of this rank's Q questions; those of one question are adjacent."""

    problems: list[Problem] = field(metadata=BY_QUESTION)  # Q
    prompts: list[list[int]] = field(metadata=BY_QUESTION)  # Q token-id lists
    completions: list[Completion] = field(metadata=BY_ROLLOUT)  # B
    group_size: int
    ids: Tensor = field(metadata=BY_ROLLOUT)  # (B,) unique over ranks, the same whatever their number
    rewards: Tensor = field(default_factory=_unset, metadata=BY_ROLLOUT)  # (B,); NaN: there is no verdict
    correct: Tensor = field(default_factory=_unset, metadata=BY_ROLLOUT)  # (B,) bool
    judged: Tensor | None = field(default=None, metadata=BY_ROLLOUT)  # (B,) bool; None: where the reward is finite
    texts: list[str] = field(default_factory=list, metadata=BY_ROLLOUT)  # B
    pending: list[Pending] = field(default_factory=list, metadata=BY_ROLLOUT)  # B until they are judged
    advantages: Tensor = field(default_factory=_unset, metadata=BY_ROLLOUT)  # (B,)
    used: Tensor = field(default_factory=_unset, metadata=BY_ROLLOUT)  # (B,) bool: takes part in the update
    token_advantages: Tensor | None = field(default=None, metadata=BY_ROLLOUT)  # (B, T) where they differ by token
    lineage: list[Lineage] = field(default_factory=list, metadata=BY_ROLLOUT)  # B where some branched
    update: list[int] = field(default_factory=list, metadata=BY_QUESTION)  # Q where ranks have unequally many questions
    prefix: float = 1.0  # share of each completion that mask.rule: prefix trains on, and continuations start from
    extra_tokens: int = 0  # generated for this batch beyond its completions: by questions dropped, by continuations
    dropped: Rollouts | None = None  # what the first draw of dynamic sampling left out, to be looked at

    def take(self, rows: Sequence[int]) -> Rollouts:
        """Some rollouts with their questions, in the order given: equally many of each, those of one adjacent."""
        questions = list(dict.fromkeys(row // self.group_size for row in rows))
        index = {"question": questions, "rollout": list(rows)}
        taken: dict[str, Any] = {}
        for each in fields(self):
            value, places = getattr(self, each.name), index.get(each.metadata.get("by", ""))
            if places is not None and value is not None and len(value):
                taken[each.name] = value[places] if isinstance(value, Tensor) else [value[i] for i in places]
        return replace(self, group_size=len(rows) // len(questions) if questions else self.group_size, **taken)

    def keep(self, rows: Sequence[int]) -> Rollouts:
        """:meth:`take`, and the tokens of all others count as extra."""
        kept = self.take(rows)
        kept.extra_tokens += int(self.lengths.sum() - kept.lengths.sum())
        return kept

    def rows_of(self, questions: Sequence[int]) -> list[int]:
        return [q * self.group_size + i for q in questions for i in range(self.group_size)]

    @staticmethod
    def joined(parts: Sequence[Rollouts]) -> Rollouts:
        """Judged rollouts of several draws, or of several ranks, as one batch."""
        whole: dict[str, Any] = {"extra_tokens": sum(part.extra_tokens for part in parts)}
        for each in fields(Rollouts):
            values = [getattr(part, each.name) for part in parts]
            if "by" in each.metadata and values[0] is not None:
                whole[each.name] = torch.cat(values) if isinstance(values[0], Tensor) else list(chain(*values))
        return replace(parts[0], **whole)

    def updates(self, count: int) -> list[int]:
        """Which of ``count`` optimizer steps reads each question, Q numbers."""
        return self.update or nth_part(range(len(self.problems)), len(self.problems), count)

    def question_of(self, row: int) -> Problem:
        return self.problems[row // self.group_size]

    @property
    def each_prompt(self) -> list[list[int]]:
        """The prompt of every rollout, B token-id lists."""
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]

    @property
    def each_completion(self) -> list[list[int]]:
        """The tokens of every rollout, B token-id lists."""
        return [completion.token_ids for completion in self.completions]

    def state_dict(self) -> dict[str, Any]:
        """Judged rollouts as plain values, for a checkpoint."""
        plain = {
            "problems": [problem.id for problem in self.problems],
            "completions": [(c.token_ids, c.logprobs, c.finish_reason) for c in self.completions],
        }
        kept = ["prompts", "group_size", "ids", "rewards", "correct", "judged"]
        kept += ["texts", "lineage", "update", "prefix", "extra_tokens"]
        plain["dropped"] = self.dropped and self.dropped.state_dict()
        return plain | {name: getattr(self, name) for name in kept}

    @staticmethod
    def from_state(state: dict[str, Any], problems: Mapping[str, Problem]) -> Rollouts:
        """What :meth:`state_dict` wrote; ``problems`` by their ids."""
        built = {
            "problems": [problems[name] for name in state["problems"]],
            "completions": [Completion(*each) for each in state["completions"]],
            "dropped": Rollouts.from_state(state["dropped"], problems) if state.get("dropped") else None,
        }
        return Rollouts(**(state | built))

    def loads(self, *, share_prompts: bool) -> list[int]:
        """Tokens that the update reads for each question, Q numbers."""
        lengths, n = self.lengths, self.group_size
        found = []
        for q, prompt in enumerate(self.prompts):
            used = self.used[q * n : (q + 1) * n]  # (n,)
            times = min(int(used.sum()), 1) if share_prompts else int(used.sum())
            found.append(int(lengths[q * n : (q + 1) * n][used].sum()) + times * len(prompt))
        return found

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(c.token_ids) for c in self.completions], dtype=torch.long)  # (B,)

    def repeated(self) -> Tensor:
        """True for a token that an earlier rollout of the update has drawn for this one too: what branches begin with.
        (B, T)"""
        mask = torch.zeros_like(self.logp_engine, dtype=torch.bool)  # (B, T)
        ends: dict[int, int] = {}  # of what the rollouts seen so far have of each request's tokens
        for row, lineage in enumerate(self.lineage):
            if self.used[row]:
                start = 0
                for request, end in lineage:
                    mask[row, start : min(end, ends.get(request, 0))] = True
                    start, ends[request] = end, max(end, ends.get(request, 0))
        return mask

    @property
    def judged_correct(self) -> Tensor:
        """1 right, 0 wrong, NaN without a verdict, whatever reward took its place. (B,) float32"""
        judged = self.rewards.isfinite() if self.judged is None else self.judged  # (B,)
        return self.correct.float().where(judged, torch.nan)

    @property
    def truncated(self) -> Tensor:
        """Whether a completion was cut by the length limit. (B,) bool"""
        return torch.tensor([c.finish_reason == "length" for c in self.completions], dtype=torch.bool)

    @cached_property
    def logp_engine(self) -> Tensor:
        """Sampling log-probabilities that the engine reported, padded. (B, T)"""
        flat = torch.tensor([p for c in self.completions for p in c.logprobs], dtype=torch.float32)
        return pad(flat, self.lengths)


def nth_part(places: Iterable[int], total: int, parts: int) -> list[int]:
    """In which of so many equal parts of ``total`` things each place is."""
    return [((place + 1) * parts - 1) // total for place in places]


def deal(loads: Sequence[int], ranks: int) -> list[list[int]]:
    """Items dealt out so that all ranks carry about the same: the heaviest first, each to the rank with least.

    No rank gets more than the mean and the heaviest item (Graham, 1969). Each rank's items are in ascending order.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    carried = [0] * ranks
    for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
        rank = min(range(ranks), key=lambda r: (carried[r], len(shares[r])))
        shares[rank].append(item)
        carried[rank] += loads[item]
    return [sorted(share) for share in shares]


def balanced(rollouts: Rollouts, *, share_prompts: bool) -> Rollouts:
    """This rank's share when the questions of all ranks are dealt out by their tokens; a collective.

    Completions differ in length, and groups that do not vary may be left out: else the slowest rank sets the pace.
    """
    if distributed.world_size() == 1:
        return rollouts
    everywhere = Rollouts.joined(distributed.gather_objects(replace(rollouts, dropped=None)))
    shares = deal(everywhere.loads(share_prompts=share_prompts), distributed.world_size())
    share = everywhere.take(everywhere.rows_of(shares[distributed.rank()]))
    return replace(share, extra_tokens=rollouts.extra_tokens, dropped=rollouts.dropped)
