"""Which completion tokens get a gradient: m_t = 1[MI_t > mu + kappa sigma] and variants (AIPO, sections 3.2 and 3.3).

A rule that ranks tokens is one threshold: a token is selected if its score lies strictly above it, or with ``invert``
as many are that score lowest. Scores that are not finite enter no statistic and are then never selected, nor is
padding. Constant scores select nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from aipo.config.base import Statistic
from aipo.config.sections import MaskConfig
from aipo.layout import token_grid

MAX_PEAKS = 40
NOISE = 1e-6  # a spread below this share of the centre is fp32 rounding: such scores are constant


def threshold_mask(
    scores: Tensor, lengths: Tensor, *, kappa: float, statistic: Statistic = "mean_std", tau: float = 1.5
) -> Tensor:
    """Select scores (B, T) above a threshold over the first ``lengths`` (B,) tokens of their own row -> bool (B, T).

    ``mean_std``: mu + kappa sigma, sigma being the population standard deviation (that of one token is 0).
    ``iqr``: Q3 + tau IQR, kappa unused. ``iqr_kappa``: mu + kappa IQR.
    """
    counted = token_grid(lengths, scores.shape[-1]) & scores.isfinite()
    return _above(scores, counted, _threshold(_statistics(scores, counted, statistic), statistic, kappa, tau))


def local_maxima(scores: Tensor, lengths: Tensor) -> Tensor:
    """(B, T), (B,) -> bool (B, T): tokens that score more than both neighbours.

    A plateau counts once, at its first token. The first and last token of a completion have one neighbour only and
    never count, as in ``scipy.signal.find_peaks``. A score that is not finite lies below every other.
    """
    inside = token_grid(lengths, scores.shape[-1])
    values = torch.where(scores.isfinite(), scores, -torch.inf)
    left, right = values[:, :-1], values[:, 1:]
    step = ((right > left).int() - (right < left).int()) * inside[:, 1:]  # (B, T - 1): up, level or down to the next
    # What follows the plateau that starts at t is the first non-zero step from t on: fill zeros from the right.
    T = step.shape[1]
    index = torch.where(step != 0, torch.arange(T, device=step.device), T)
    following = index.flip(1).cummin(1).values.flip(1)  # (B, T - 1)
    leaving = torch.nn.functional.pad(step, (0, 1)).gather(1, following)
    peaks = torch.zeros_like(inside)
    peaks[:, 1:-1] = (step[:, :-1] > 0) & (leaving[:, 1:] < 0)
    return peaks


def peaks(scores: Tensor, *, kappa: float, statistic: Statistic = "mean_std", tau: float = 1.5) -> Tensor:
    """Local maxima above the threshold of :func:`threshold_mask` of one completion: (T,) -> bool (T,)."""
    row, length = scores[None], torch.tensor([len(scores)], device=scores.device)
    above = threshold_mask(row, length, kappa=kappa, statistic=statistic, tau=tau)
    return (above & local_maxima(row, length))[0]


def count_peaks(scores: Tensor, *, kappa: float, statistic: Statistic = "mean_std", tau: float = 1.5) -> int:
    """N_peak of one completion (T,), clipped to 0..40 (AIPO, section 3.3)."""
    return min(MAX_PEAKS, int(peaks(scores, kappa=kappa, statistic=statistic, tau=tau).sum()))


def prefix_lengths(lengths: Tensor, share: float) -> Tensor:
    """floor(share * length) of each completion, (B,) -> (B,): the part that the prefix rule trains on (PPPO)."""
    return (lengths.double() * share + 1e-9).floor().long()  # 0.35 * 20 is 6.99...


def prefix_share(stalls: int, config: MaskConfig) -> float:
    """eta of PPPO: from ``prefix_start`` by ``prefix_step`` for every stall of the validation accuracy, up to
    ``prefix_end``."""
    return min(config.prefix_end, config.prefix_start + config.prefix_step * stalls)


class MaskRule:
    """A selection rule with its scope.

    The keys of ``mask`` that it reads:
        rule: ``threshold``; ``peaks_only``, its local maxima; ``top_fraction``, the round(fraction n) highest scores,
            at least one, and fewer where ties at the cut would exceed that budget; ``quadrant``: the scores are numbers
            of quadrants, and those equal to ``quadrant`` are selected (HAPO's controlled intervention). ``all``,
            ``prefix`` and those that draw look at lengths only: ``random`` (as many as top_fraction, per sequence),
            ``bernoulli`` (each token by itself with the chance ``fraction``), ``random_prefix`` (the first L tokens,
            L uniform from ``shortest`` to all of them).
        scope: the tokens that share one threshold: a ``sequence``, the adjacent ``group_size`` rollouts of a question,
            the ``micro_batch`` that :meth:`select` is given, the ``batch`` over all ranks, or ``running``: the batch's
            statistics averaged over steps by ``decay``, or with a decay of 1 those of all tokens of the run so far.
            ``causal``: a token's threshold is made of its completion up to and including itself.
        statistic: ``mean_std`` (mu + kappa sigma), ``iqr`` (Q3 + tau IQR) or ``iqr_kappa`` (mu + kappa IQR).
        invert: of each completion the lowest scores instead, as many as the rule selects of it; a control.
    ``local`` says that what one call is given is decided from its own scores, so that the mask needs no second pass.
    """

    def __init__(self, config: MaskConfig, *, group_size: int = 1, seed: int = 0) -> None:
        self.rule, self.scope, self.statistic, self.tau = config.rule, config.scope, config.statistic, config.tau
        self.fraction, self.quadrant, self.group_size, self.seed = config.fraction, config.quadrant, group_size, seed
        self.decay, self.invert = config.decay, config.invert
        self.draws, self.reweight, self.shortest = config.draws, config.reweight, config.shortest
        self.running: Tensor | None = None  # averaged statistics, as _statistics returns them
        self.seen = 0  # tokens behind them

    @property
    def local(self) -> bool:
        by_itself = self.draws or self.rule in ("all", "prefix", "quadrant")
        return by_itself or self.scope in ("sequence", "causal", "micro_batch")

    def select(
        self,
        scores: Tensor,
        lengths: Tensor,
        *,
        kappa: float,
        step: int,
        rollout_ids: Tensor,
        prefix: float = 1.0,
        gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Tensor:
        """scores (B, T), lengths (B,) -> bool (B, T).

        ``rollout_ids`` (B,) and ``step`` seed the rules that draw; ``prefix`` is the share of the prefix rule.
        ``gather`` turns this rank's 1-D tensor into the concatenation over ranks; scopes batch and running call it
        exactly once. With scope running, a call is one update of the averages. Raises ValueError if scope is group and
        B is no multiple of ``group_size``.
        """
        inside = token_grid(lengths, scores.shape[-1])
        if self.rule == "all":
            return inside
        if self.draws:
            return self._drawn(inside, lengths, step, rollout_ids)
        if self.rule == "prefix":
            return token_grid(prefix_lengths(lengths, prefix), scores.shape[-1])
        if self.rule == "quadrant":
            return inside & (scores == self.quadrant)
        counted = inside & scores.isfinite()
        statistic = "top_fraction" if self.rule == "top_fraction" else self.statistic
        if self.scope == "sequence":
            statistics = _statistics(scores, counted, statistic, self.fraction)
        elif self.scope == "causal":
            statistics = _statistics_so_far(scores, counted)
        elif self.scope == "group":
            if len(scores) % self.group_size:
                raise ValueError(f"{len(scores)} rollouts are no whole number of groups of {self.group_size}")
            pooled = (len(scores) // self.group_size, self.group_size * scores.shape[1])
            groups = _statistics(scores.reshape(pooled), counted.reshape(pooled), statistic, self.fraction)
            statistics = groups.repeat_interleave(self.group_size, 0)
        else:
            mine = scores[counted]
            everywhere = (mine if self.scope == "micro_batch" else gather(mine))[None]  # (1, tokens)
            everything = torch.ones_like(everywhere, dtype=torch.bool)
            statistics = _statistics(everywhere, everything, statistic, self.fraction)
            if self.scope == "running":
                statistics = self._average(statistics, everywhere.shape[1])
        selected = _above(scores, counted, _threshold(statistics, statistic, kappa, self.tau))
        if self.rule == "peaks_only":
            selected &= local_maxima(scores, lengths)
        return lowest(scores, counted, selected.sum(1)) if self.invert else selected

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.running is None else {"running": self.running, "seen": torch.tensor(self.seen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.running, self.seen = state.get("running"), int(state.get("seen", 0))

    def _average(self, new: Tensor, tokens: int) -> Tensor:
        """Take up the statistics (1, 2) of a step's tokens, and return those of the run so far."""
        if self.running is None or not self.running.isfinite().all():
            self.running, self.seen = new, tokens
        elif tokens:  # a step without a token says nothing
            old, share = self.running.to(new), 1 - self.decay
            if self.decay == 1:  # Welford's update by a whole batch: exact for all tokens together
                share = tokens / (self.seen + tokens)
            self.running = old + share * (new - old)
            if self.decay == 1:
                self.running[:, 1] += share * (1 - share) * (new - old)[:, 0].square()  # variance between the two
            self.seen += tokens
        return self.running.to(new)

    def inclusion(self, lengths: Tensor, width: int) -> Tensor:
        """Chance with which a rule that draws selects each token: (B,) -> (B, width), 1 in padding."""
        length = lengths[:, None].double()  # (B, 1)
        place = torch.arange(1, width + 1, device=lengths.device)  # (T,)
        if self.rule == "random":
            budgets = [_budget(n, self.fraction) for n in lengths.tolist()]
            chance = torch.tensor(budgets, device=lengths.device)[:, None] / length.clamp(min=1)  # (B, 1)
        elif self.rule == "bernoulli":
            chance = torch.full_like(length, self.fraction)  # (B, 1)
        elif self.rule == "random_prefix":
            shortest = length.clamp(max=self.shortest)  # (B, 1)
            chance = ((length - place + 1) / (length - shortest + 1)).clamp(max=1)  # (B, T) P(L >= place)
        else:
            raise ValueError(f"rule {self.rule!r} draws no tokens")
        return torch.where(token_grid(lengths, width), chance, 1.0).float()

    def _drawn(self, inside: Tensor, lengths: Tensor, step: int, rollout_ids: Tensor) -> Tensor:
        selected = torch.zeros_like(inside)
        for row, (length, rollout) in enumerate(zip(lengths.tolist(), rollout_ids.tolist())):
            if not length:
                continue
            random = np.random.default_rng([self.seed, step, rollout])
            if self.rule == "random":
                chosen = random.permutation(length)[: _budget(length, self.fraction)]
            elif self.rule == "bernoulli":
                chosen = np.flatnonzero(random.random(length) < self.fraction)
            else:
                chosen = np.arange(random.integers(min(self.shortest, length), length + 1))
            selected[row, torch.from_numpy(chosen).to(inside.device)] = True
        return selected


def lowest(scores: Tensor, counted: Tensor, count: Tensor) -> Tensor:
    """The ``count`` (B,) lowest of the ``counted`` scores, (B, T) both, earlier before later ones -> bool (B, T)."""
    order = torch.where(counted, scores, torch.inf).argsort(dim=1, stable=True)  # (B, T)
    return order.argsort(1) < count[:, None]


def _budget(tokens: int, fraction: float) -> int:
    return max(1, round(fraction * tokens))


def _statistics(scores: Tensor, counted: Tensor, statistic: str, fraction: float = 1.0) -> Tensor:
    """What thresholds are made of, for every row of (R, T): fp64 (R, 2), NaN where no score counts.

    Mean and variance, or third and first quartile, or mean and the quartiles' distance, or the cut above which a
    fraction lies, twice.
    """
    values = scores.double()
    if statistic == "mean_std":
        count = counted.sum(1)  # (R,)
        mean = torch.where(counted, values, 0).sum(1) / count
        variance = torch.where(counted, values - mean[:, None], 0).square().sum(1) / count
        return torch.stack([mean, variance], 1)
    rows = []
    for row, keep in zip(values, counted):
        ordered = row[keep].sort(descending=True).values  # (n,)
        if not len(ordered):
            rows.append(ordered.new_full((2,), torch.nan))
        elif statistic == "iqr":
            rows.append(torch.stack([_quantile(ordered, 0.75), _quantile(ordered, 0.25)]))
        elif statistic == "iqr_kappa":
            rows.append(torch.stack([ordered.mean(), _quantile(ordered, 0.75) - _quantile(ordered, 0.25)]))
        else:
            budget = _budget(len(ordered), fraction)
            cut = ordered[budget] if budget < len(ordered) else ordered.new_tensor(-torch.inf)
            rows.append(torch.stack([cut, cut]))
    return torch.stack(rows) if rows else values.new_empty(0, 2)  # a rank without rollouts


def _statistics_so_far(scores: Tensor, counted: Tensor) -> Tensor:
    """Mean and variance of the counted scores of (B, T) up to and including each: fp64 (B, T, 2)."""
    values = torch.where(counted, scores, 0).double()  # (B, T)
    count = counted.cumsum(1).clamp(min=1)  # (B, T)
    # variances do not depend on the origin; one among the scores keeps the difference below exact
    origin = values.gather(1, counted.int().argmax(1, keepdim=True)) if values.shape[1] else 0.0  # (B, 1), the first
    shifted = torch.where(counted, values - origin, 0)  # (B, T)
    mean = shifted.cumsum(1) / count
    variance = (shifted.square().cumsum(1) / count - mean.square()).clamp(min=0)
    return torch.stack([origin + mean, variance], 2)


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """Linear interpolation in descending scores (n,); torch.quantile stops at 16 million."""
    position = (1 - q) * (len(ordered) - 1)
    low = int(position)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], position - low)


def _threshold(statistics: Tensor, statistic: str, kappa: float, tau: float) -> Tensor:
    """(..., 2) -> (...)."""
    first, second = statistics.unbind(-1)
    if statistic == "mean_std":
        std = second.sqrt()
        return torch.where(std > NOISE * first.abs(), first + kappa * std, torch.inf)
    if statistic == "iqr":
        return first + torch.maximum(tau * (first - second), NOISE * first.abs())
    if statistic == "iqr_kappa":
        return first + torch.maximum(kappa * second, NOISE * first.abs())
    return first


def _above(scores: Tensor, counted: Tensor, threshold: Tensor) -> Tensor:
    """(B, T), (B, T), and (B,), (1,) or (B, T) -> bool (B, T)."""
    return counted & (scores.double() > (threshold if threshold.dim() == 2 else threshold[:, None]))
