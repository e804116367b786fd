"""Which tokens are trained on: scores, then the mask, of one optimizer batch.

Rules that look at one sequence alone (the default) run *inside* the training forward, on the hidden states that are
about to be back-propagated: no second forward. Rules that look further need the whole batch first: a probe. Rules that
need no state at all decide before it; what is decided early need not be laid out behind the last selected token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from aipo import distributed
from aipo.config import Config
from aipo.mask import MaskRule
from aipo.rollouts import MicroBatch, Rollouts, pad, token_grid, unpad
from aipo.scorer import TokenScorer

States = Callable[[MicroBatch], Tensor]
"""micro-batch -> (N, d) hidden states that predict its completion tokens; a collective"""


class TokenSelector:
    """Scores and mask of the rollouts given to :meth:`begin`, (B, T) each; filled as micro-batches come by.

    ``scored`` says whether mutual information is needed at all, ``local`` that no probe is.
    """

    def __init__(self, config: Config) -> None:
        mi, mask = config.mi, config.mask
        self.scorer = TokenScorer(
            estimator=mi.estimator,
            features=mi.features,
            num_features=mi.num_features,
            sigma=mi.sigma,
            center=mi.center,
            normalize=mi.normalize,
            ema_decay=mi.ema_decay,
            warmup_steps=mi.warmup_steps,
            max_positions=config.rollout.max_tokens,
            seed=config.seed,
            all_reduce=distributed.all_reduce,
        )
        self.rule = MaskRule(
            rule=mask.rule,
            scope=mask.scope,
            statistic=mask.statistic,
            tau=mask.tau,
            fraction=mask.fraction,
            quadrant=mask.quadrant,
            group_size=config.rollout.samples_per_question,
            seed=config.seed,
        )
        self.scored = (
            (mask.score == "mi" and mask.rule in ("threshold", "top_fraction", "peaks_only"))
            or config.advantage.mi_blend != "none"
            or config.curriculum.refresh_every is not None
        )
        self.local = self.rule.local and (self.scorer.local or not self.scored)
        # what needs no state of this forward, and would leave something out
        self.stateless = not self.scored and mask.rule != "all" and mask.scope != "micro_batch"
        self.seconds = 0.0  # spent on scores and masks; the caller resets it

    def begin(
        self,
        rollouts: Rollouts,
        gold: Tensor | None,
        *,
        kappa: float,
        step: int,
        prefix: float = 1.0,
        ranking: Tensor | None = None,
    ) -> None:
        """Start on new rollouts.

        Args:
            gold: (Q, d) states of the gold answers, None if nothing is scored.
            prefix: share of the prefix rule.
            ranking: (B, T) what the mask rule looks at instead of mutual information; NaN is never selected.
        """
        self.lengths = rollouts.lengths  # (B,)
        width = max(int(self.lengths.max()), 1) if len(self.lengths) else 1
        self.scores = torch.full((len(self.lengths), width), float("nan"))  # (B, T)
        self.mask = torch.zeros(len(self.lengths), width, dtype=torch.bool)  # (B, T)
        self.gold, self.group_size, self.ids = gold, rollouts.group_size, rollouts.ids
        self.kappa, self.step, self.decided = kappa, step, False
        self.prefix, self.ranking = prefix, self.scores if ranking is None else ranking  # (B, T)
        if gold is not None:
            with self._timed(gold):
                self.scorer.prepare(gold)

    def probe(self, batches: Sequence[MicroBatch], states: States) -> None:
        """Score all micro-batches, then decide every mask. Collective; does nothing where the training forward can."""
        if self.local and not self.stateless:
            return
        if self.scored:
            self.score_all(batches, states)
        lengths = torch.where(self._seen(batches), self.lengths, 0)  # (B,) rollouts outside the update do not count
        self.mask = self.rule.select(
            self.ranking,
            lengths,
            kappa=self.kappa,
            step=self.step,
            rollout_ids=self.ids,
            prefix=self.prefix,
            gather=distributed.gather,
        )
        self.decided = True

    @property
    def ends(self) -> Tensor:
        """Tokens of each rollout up to the last selected one; 0 where none is. (B,)"""
        place = torch.arange(1, self.mask.shape[1] + 1)  # (T,)
        return torch.where(self.mask, place, 0).amax(1)

    def score_all(self, batches: Sequence[MicroBatch], states: States) -> None:
        """Scores of all micro-batches, without a mask."""
        if not self.scorer.local:
            for micro in batches:
                self.scorer.observe(states(micro), self._gold_of(micro), micro.lengths)
            self.scorer.reduce()
        for micro in batches:
            self._score(micro, states(micro))

    def __call__(self, micro: MicroBatch, states: Tensor) -> Tensor:
        """(N, d) states of ``micro`` -> (N,) bool, its selected tokens."""
        rows = micro.rows.cpu()
        if not self.decided and len(rows):
            if self.scored:
                self._score(micro, states)
            start = time.perf_counter()
            lengths = self.lengths[rows]
            width = int(lengths.max())
            self.mask[rows, :width] = self.rule.select(
                self.ranking[rows, :width],
                lengths,
                kappa=self.kappa,
                step=self.step,
                rollout_ids=self.ids[rows],
                prefix=self.prefix,
            )
            self.seconds += time.perf_counter() - start
        return unpad(self.mask[rows], micro.lengths.cpu()).to(states.device)

    def _score(self, micro: MicroBatch, states: Tensor) -> None:
        with self._timed(states):
            scores = self.scorer.score(states, self._gold_of(micro), micro.lengths)  # (N,)
            if len(micro.rows):
                padded = pad(scores.cpu(), micro.lengths.cpu(), float("nan"))  # (b, t)
                self.scores[micro.rows.cpu(), : padded.shape[1]] = padded

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

    def _seen(self, batches: Sequence[MicroBatch]) -> Tensor:
        seen = torch.zeros(len(self.lengths), dtype=torch.bool)
        for micro in batches:
            seen[micro.rows.cpu()] = True
        return seen

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
        }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"scorer": self.scorer.state_dict(), "rule": self.rule.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self.scorer.load_state_dict(state["scorer"])
        self.rule.load_state_dict(state["rule"])
