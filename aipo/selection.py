"""Which tokens are trained on: scores, then the mask, of one optimizer batch.

Rules that look at one sequence alone (the default) run *inside* the training forward, on the hidden states that are
about to be back-propagated: no second forward. Rules that look further need the whole batch first: a probe. Rules that
need no state at all decide before it; what is decided early need not be laid out behind the last selected token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aipo import distributed
from aipo.config import Config
from aipo.layout import MicroBatch, pad, token_grid
from aipo.mask import MaskRule
from aipo.problems.datasets import Problem
from aipo.rollouts import Rollouts
from aipo.scorer import TokenScorer

States = Callable[[MicroBatch], Tensor]
"""micro-batch -> (N, d) hidden states that predict its completion tokens; a collective"""


class TokenSelector:
    """What selection keeps from step to step: draws, running statistics and the rule. :class:`Selection` is of a batch.

    ``scored`` says whether mutual information is needed at all, ``local`` that no probe is.
    """

    def __init__(self, config: Config) -> None:
        mi, mask = config.mi, config.mask
        longest, n = config.rollout.max_tokens, config.rollout.samples_per_question
        self.scorer = TokenScorer(mi, max_positions=longest, seed=config.seed, all_reduce=distributed.all_reduce)
        self.rule = MaskRule(mask, group_size=n, seed=config.seed)
        self.scored = (
            (mask.score == "mi" and mask.ranks)
            or config.advantage.mi_blend != "none"
            or config.curriculum.refresh_every is not None
        )
        self.uses_gold = self.scored or config.curriculum.enabled  # whose labels are scores too
        self.local = self.rule.local and (self.scorer.local or not self.scored)
        # what needs no state of this forward, and would leave something out
        self.stateless = not self.scored and mask.rule != "all" and mask.scope != "micro_batch"
        # whether a mask with another gold answer can be made beside the own one, by the scores of that sequence alone
        by_sequence = mask.score == "mi" and mask.ranks and self.local and mask.scope != "micro_batch"
        self.compares = by_sequence and mi.gold_control == "none"

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"scorer": self.scorer.state_dict(), "rule": self.rule.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.scorer.load_state_dict(state["scorer"])
        self.rule.load_state_dict(state["rule"])


class Selection:
    """Scores and mask of one batch of rollouts, filled as its micro-batches come by.

    Args:
        gold: (Q, d) states of the gold answers, None if nothing is scored.
        prefix: share of the prefix rule.
        ranking: (B, T) what the mask rule looks at instead of mutual information; NaN is never selected.

    Attributes:
        scores: (B, T) mutual information, NaN where nothing is scored.
        mask: (B, T) bool.
        trained: (B,) tokens of each rollout that can be in the mask: not those that an earlier one shares.
        decided: whether masks stay as they are; else a micro-batch's is made when it comes by.
        seconds: spent on scores and masks.
    """

    def __init__(
        self,
        selector: TokenSelector,
        rollouts: Rollouts,
        gold: Tensor | None,
        *,
        kappa: float,
        step: int,
        ranking: Tensor | None = None,
    ) -> None:
        self.selector, self.lengths = selector, rollouts.lengths  # (B,)
        width = max(int(self.lengths.max()), 1) if len(self.lengths) else 1
        self.scores = torch.full((len(self.lengths), width), float("nan"))  # (B, T)
        self.mask = torch.zeros(len(self.lengths), width, dtype=torch.bool)  # (B, T)
        self.gold, self.group_size, self.ids = gold, rollouts.group_size, rollouts.ids
        self.kappa, self.step, self.prefix = kappa, step, rollouts.prefix
        self.ranking = self.scores if ranking is None else ranking  # (B, T)
        self.repeated = rollouts.repeated() if rollouts.lineage else None  # (B, T)
        self.trained = self.lengths if self.repeated is None else self.lengths - self.repeated.sum(1)  # (B,)
        self.decided, self.seconds = False, 0.0
        self.wrong = other_answers(rollouts.problems) if selector.compares else None  # (Q,)
        self.overlap = torch.zeros(2, dtype=torch.long)  # tokens in both masks, and in either, of the sample
        if gold is not None:
            with self._timed(gold):
                selector.scorer.prepare(gold)

    def probe(self, batches: Sequence[MicroBatch], states: States) -> None:
        """Score all micro-batches, then decide every mask. Collective; does nothing where the training forward can."""
        if self.selector.local and not self.selector.stateless:
            return
        if self.selector.scored:
            self.score_all(batches, states)
        seen = torch.zeros(len(self.lengths), dtype=torch.bool)  # (B,)
        for micro in batches:
            seen[micro.rows.cpu()] = True
        lengths = torch.where(seen, self.lengths, 0)  # (B,) rollouts outside the update do not count
        self.mask = self._select(self.ranking, lengths, self.ids, gather=distributed.gather)
        self._leave_out_repeated(torch.arange(len(self.mask)))
        self.decided = True

    def inclusion(self, micro: MicroBatch) -> Tensor | None:
        """Chance with which each token of ``micro`` is selected, (b, t); None where no loss is to be divided by it."""
        return micro.rows_of(self._chance) if self.selector.rule.reweight else None

    @cached_property
    def _chance(self) -> Tensor:
        return self.selector.rule.inclusion(self.lengths, self.mask.shape[1])  # (B, T)

    @property
    def ends(self) -> Tensor:
        """Tokens of each rollout up to the last selected one; 0 where none is. (B,)"""
        place = torch.arange(1, self.mask.shape[1] + 1)  # (T,)
        return torch.where(self.mask, place, 0).amax(1)

    def score_all(self, batches: Sequence[MicroBatch], states: States) -> None:
        """Scores of all micro-batches, without a mask."""
        scorer = self.selector.scorer
        if not scorer.local:
            for micro in batches:
                scorer.observe(states(micro), self._gold_of(micro), micro.lengths)
            scorer.reduce()
        for micro in batches:
            self._score(micro, states(micro))

    def __call__(self, micro: MicroBatch, states: Tensor) -> Tensor:
        """(N, d) states of ``micro`` -> (N,) bool, its selected tokens."""
        rows = micro.rows.cpu()
        if not self.decided and len(rows):
            if self.selector.scored:
                self._score(micro, states)
            start = time.perf_counter()
            lengths = self.lengths[rows]
            width = int(lengths.max())
            self.mask[rows, :width] = self._select(self.ranking[rows, :width], lengths, self.ids[rows])
            self._leave_out_repeated(rows)
            self.seconds += time.perf_counter() - start
            if self.wrong is not None:
                self._compare(micro, states, self.wrong)
        return micro.ragged_of(self.mask)

    def _select(self, ranking: Tensor, lengths: Tensor, ids: Tensor, **options: Any) -> Tensor:
        """The rule's mask of some rollouts: (b, t), (b,), (b,) -> bool (b, t)."""
        told: dict[str, Any] = {"kappa": self.kappa, "step": self.step, "prefix": self.prefix}
        return self.selector.rule.select(ranking, lengths, rollout_ids=ids, **told, **options)

    def _leave_out_repeated(self, rows: Tensor) -> None:
        if self.repeated is not None:
            self.mask[rows] &= ~self.repeated[rows]

    def _score(self, micro: MicroBatch, states: Tensor) -> None:
        with self._timed(states):
            scores = self.selector.scorer.score(states, self._gold_of(micro), micro.lengths)  # (N,)
            micro.write(self.scores, scores.cpu())

    def _compare(self, micro: MicroBatch, states: Tensor, wrong: Tensor) -> None:
        """Beside the mask of the first rollout of each question, the one that another question's gold would make.

        The states are those of the forward under way, and all golds' are there: it costs the scores alone.
        """
        rows, n = micro.rows.cpu(), self.group_size
        sample = (rows % n == 0) & (wrong[rows // n] >= 0)  # (b,)
        if not sample.any():
            return
        assert self.gold is not None
        lengths, rows = micro.lengths.cpu()[sample], rows[sample]  # (k,)
        own = sample.repeat_interleave(micro.lengths.cpu()).to(states.device)  # (N,)
        with self._timed(states):
            gold = self.gold[wrong[rows // n].to(self.gold.device)]  # (k, d)
            scores = self.selector.scorer.score(states[own], gold, lengths.to(micro.lengths.device)).cpu()
            twin = self._select(pad(scores, lengths), lengths, self.ids[rows])  # (k, t)
        if self.repeated is not None:
            twin &= ~self.repeated[rows, : twin.shape[1]]
        mask = self.mask[rows, : twin.shape[1]]  # (k, t)
        self.overlap += torch.stack([(mask & twin).sum(), (mask | twin).sum()])

    @contextmanager
    def _timed(self, states: Tensor) -> Iterator[None]:
        if states.is_cuda:  # or the forward still under way would be charged to the scores
            torch.cuda.synchronize(states.device)
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def _gold_of(self, micro: MicroBatch) -> Tensor:
        assert self.gold is not None
        return self.gold[micro.rows // self.group_size]  # (b, d)

    def sums(self) -> dict[str, float]:
        """Sums for logging over the rollouts scored: of MI, of its skewness within a sequence, and their counts."""
        tokens = token_grid(self.lengths, self.scores.shape[1]) & self.scores.isfinite()  # (B, T)
        count = tokens.sum(1)  # (B,)
        scores = torch.where(tokens, self.scores, 0.0).double()  # (B, T)
        centred = torch.where(tokens, scores - (scores.sum(1) / count.clamp(min=1))[:, None], 0.0)
        variance = centred.square().sum(1) / count.clamp(min=1)  # (B,)
        varied = variance > 0
        skew = centred.pow(3).sum(1) / count.clamp(min=1) / variance.clamp(min=1e-300).pow(1.5)  # (B,)
        return {
            "mi": float(scores.sum()),
            "mi_tokens": float(tokens.sum()),
            "mi_skew": float(skew[varied].sum()),
            "mi_sequences": float(varied.sum()),
            "wrong_gold_both": float(self.overlap[0]),
            "wrong_gold_either": float(self.overlap[1]),
        }


def other_answers(problems: Sequence[Problem]) -> Tensor:
    """For each of Q questions the place of the next one, in a circle, that has another answer; -1 if none has. (Q,)"""
    count = len(problems)
    found = [
        next((j for i in range(1, count) if problems[j := (q + i) % count].answer != problems[q].answer), -1)
        for q in range(count)
    ]
    return torch.tensor(found, dtype=torch.long)
