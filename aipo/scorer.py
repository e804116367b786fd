"""Token scores of a run: the object that the trainer uses, and the estimators that look beyond one sequence.

``coordinate`` scores a sequence alone. ``pointwise`` and ``position`` (see :mod:`aipo.mi`) need moments over the whole
batch and all ranks first, and ``pointwise`` keeps a running average of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from aipo.config.base import Estimator, Features, Normalize
from aipo.config.sections import MIConfig
from aipo.mi import FourierFeatures, Sigma, factor_scores, gold_factors, median_bandwidth, positive, token_bandwidths
from aipo.mi_normalized import normalized_scores


def batch_scores(
    hidden: Tensor,
    gold: Tensor,
    lengths: Tensor,
    *,
    estimator: Estimator,
    num_features: int,
    sigma: Sigma,
    seed: int = 0,
    center: bool = True,
    features: Features = "random",
) -> Tensor:
    """Scores by an estimator that looks beyond one sequence, of one batch alone.

    hidden (N, d) holds the tokens of B rollouts one after another, gold (B, d), lengths (B,) with sum N -> fp32 (N,).
    "median" takes the tokens' bandwidth for both variables.

    ``pointwise``: each token's share phi_c(h_t)^T C psi_c(h*) of ||C||_F^2, C the cross-covariance over this batch. The
    scores average to HSIC (n - 1)/n and may be negative. ``position``: HSIC over the rollouts still running at step t,
    shared by all of them; a step that fewer than two rollouts reach scores 0.
    """
    config = MIConfig(estimator=estimator, features=features, num_features=num_features, sigma=sigma, center=center)
    scorer = TokenScorer(config, seed=seed, max_positions=max(1, int(lengths.max())))
    scorer.observe(hidden, gold, lengths)
    scorer.reduce()
    return scorer.score(hidden, gold, lengths)


@dataclass
class Moments:
    """Sums of features over samples, in fp64, for P independent sets of samples."""

    count: Tensor  # (P,)
    x: Tensor  # (P, D)
    y: Tensor  # (P, D)
    xy: Tensor  # (P, D, D)

    @classmethod
    def zeros(cls, sets: int, num_features: int, device: torch.device) -> Moments:
        shapes = [(sets,), (sets, num_features), (sets, num_features), (sets, num_features, num_features)]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, start: int, count: Tensor, phi_x: Tensor, phi_y: Tensor) -> None:
        """Add to the sets from ``start`` on: count (p,), phi_x (p, D) summed over a set, phi_y (D,) common to all."""
        sets = slice(start, start + len(count))
        self.count[sets] += count
        self.x[sets] += phi_x
        self.y[sets] += count[:, None] * phi_y
        self.xy[sets] += phi_x[:, :, None] * phi_y

    def means(self, center: bool) -> tuple[Tensor, Tensor]:
        """(P, D) means of phi_x and phi_y, or zeros where nothing is to be centred."""
        count = self.count.clamp(min=1)[:, None] if center else torch.inf
        return self.x / count, self.y / count

    def covariance(self, center: bool) -> Tensor:
        """(P, D, D), with n - 1; zero for a set of fewer than two samples."""
        mean_x, _ = self.means(center)
        total = self.xy - mean_x[:, :, None] * self.y[:, None, :]
        return total * ((self.count > 1) / (self.count - 1).clamp(min=1))[:, None, None]

    def averaged(self, new: Moments, decay: float) -> Moments:
        """Moving average of the means, with the sample count of ``new``."""
        old_weight = decay * new.count / self.count.clamp(min=1)
        mix = [(1 - decay) * b + a * old_weight.view(-1, *[1] * (a.dim() - 1)) for a, b in zip(self, new)]
        return Moments(new.count, *mix[1:])

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.count, self.x, self.y, self.xy))


BLOCK_ELEMENTS = 2**23  # float64 moments of a block of positions, 64 MiB


class PositionSums:
    """Sums of phi_x by position over the rollouts that share a gold state, in fp64.

    The gold states of a rank are few, so that these T D numbers for each are less than the T D^2 of all moments, which
    are made of them for a few positions at a time.
    """

    def __init__(self, num_features: int, device: torch.device) -> None:
        self.num_features, self.device = num_features, device
        self.parts: dict[bytes, tuple[Tensor, Tensor, Tensor]] = {}  # of each gold state: (D,), (T,), (T, D)

    def add(self, key: bytes, measured: Tensor, phi_x: Tensor, phi_y: Tensor) -> None:
        """A rollout: measured (t,), phi_x (t, D), phi_y (D,); ``key`` is that of its gold state."""
        if key not in self.parts:
            self.parts[key] = phi_y, measured.clone(), phi_x.clone()
            return
        _, count, x = self.parts[key]
        if len(measured) > len(count):
            count, measured, x, phi_x = measured.clone(), count, phi_x.clone(), x
        count[: len(measured)] += measured
        x[: len(phi_x)] += phi_x
        self.parts[key] = phi_y, count, x

    def count(self, positions: int) -> Tensor:
        """Rollouts at each of the first positions. (T,)"""
        total = torch.zeros(positions, dtype=torch.float64, device=self.device)
        for _, count, _ in self.parts.values():
            total[: len(count)] += count
        return total

    def moments(self, start: int, stop: int) -> Moments:
        """Of the positions from ``start`` to ``stop``."""
        moments = Moments.zeros(stop - start, self.num_features, self.device)
        for phi_y, count, x in self.parts.values():
            moments.add(0, count[start:stop], x[start:stop], phi_y)
        return moments


class TokenScorer:
    """Scores the completion tokens of a run, holding what must outlive a step: the draws and the running covariance.

    ``local`` says that a rollout's scores depend on that rollout alone (coordinate). Then ``score`` is all there is,
    and it can be called on the hidden states of the very forward that is back-propagated. Otherwise a step takes two
    passes over its micro-batches: ``observe`` each, ``reduce`` once, ``score`` each, on every rank.

    Keys of ``mi`` beyond the arguments of :func:`fast_hsic`, and arguments:
        normalize: "layernorm" gives every state zero mean and unit variance over its coordinates; "zscore" does so for
            every coordinate over the rollout's tokens (h* with the same shift and scale). "none" takes raw states.
        normalized: "cca" is the normalised HSIC of :mod:`aipo.mi_normalized`; coordinate only.
        sigma: with "median", coordinate finds the bandwidths of every rollout anew; the others fix one for the run,
            the mean over ranks of the first micro-batch's, for both variables.
        ema_decay, warmup_steps: pointwise averages the moments behind C over steps, plainly during ``warmup_steps``
            and then by a moving average. With 0 and 0 every step's C is its own.
        max_positions: the longest completion; only position needs it. It takes 8 T D bytes for each different gold
            state of a rank, whatever the number of rollouts.
        all_reduce: sums a tensor over ranks, in place, and returns it.
    Raises ValueError for quadrature features of vectors, and for position without ``max_positions``.
    """

    def __init__(
        self,
        config: MIConfig,
        *,
        max_positions: int | None = None,
        seed: int = 0,
        all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        estimator, features, num_features, sigma = config.estimator, config.features, config.num_features, config.sigma
        if estimator != "coordinate" and features == "quadrature":
            raise ValueError(f"quadrature features exist for scalars only: the {estimator} estimator has vectors")
        if estimator == "position" and max_positions is None:
            raise ValueError("the position estimator needs max_positions, the longest completion")
        self.estimator, self.features, self.num_features, self.sigma = estimator, features, num_features, sigma
        self.center, self.normalize, self.seed = config.center, config.normalize, seed
        self.epsilon = config.epsilon if config.normalized == "cca" else None
        self.ema_decay, self.warmup_steps, self.all_reduce = config.ema_decay, config.warmup_steps, all_reduce
        self.max_positions = max_positions
        self.bandwidth = None if sigma == "median" else torch.tensor(positive(sigma), dtype=torch.float64)
        # Vectors get their draw when their size is known.
        self.phi_of = FourierFeatures.draw(features, 1, num_features, seed) if self.local else None
        self.factors: Tensor | None = None  # (Q, d, r) of the gold states last seen
        self.places: dict[bytes, int] = {}  # a gold state's place among them
        self.batch: Moments | PositionSums | None = None  # sums over this step's micro-batches so far
        self.running: Moments | None = None  # what scores are made from
        self.by_position: Tensor | None = None  # (T,) the scores themselves
        self.steps = 0

    @property
    def local(self) -> bool:
        return self.estimator == "coordinate"

    @torch.no_grad()
    def score(self, hidden: Tensor, gold: Tensor, lengths: Tensor) -> Tensor:
        """hidden (N, d): states of B rollouts one after another; gold (B, d); lengths (B,), sum N -> fp32 (N,)."""
        if self.local:
            return self._score_alone(hidden, gold, lengths)
        scores = [hidden.new_zeros(0, dtype=torch.float32)]
        if not len(lengths):
            return scores[0]
        if self.running is None and self.by_position is None:
            raise RuntimeError(f"the {self.estimator} estimator scores after observe() and reduce()")
        if self.running is not None:
            covariance = self.running.covariance(self.center)[0]  # (D, D)
            mean_x, mean_y = self.running.means(self.center)  # (1, D) each
        for states, answer in self._rollouts(hidden, gold, lengths):
            phi_x, phi_y, measured = self._phi(states, answer)
            if self.by_position is not None:
                score = self.by_position[: len(states)]
            else:
                score = (phi_x - mean_x) @ (covariance @ (phi_y - mean_y[0]))
            scores.append((score * measured).float())
        return torch.cat(scores)

    @torch.no_grad()
    def prepare(self, gold: Tensor) -> None:
        """Do what depends on the gold states (Q, d) of a step alone, for all of its micro-batches at once.

        Not needed for :meth:`score`, which otherwise does it for every micro-batch. Only ``local`` scorers gain, and
        none with "zscore", where every rollout moves its gold state.
        """
        if self.local and self.normalize != "zscore":
            self._factors_of(_normalized(gold, gold, self.normalize)[1])

    @torch.no_grad()
    def observe(self, hidden: Tensor, gold: Tensor, lengths: Tensor) -> None:
        """Add a micro-batch (shapes as ``score``; it may be empty) to the moments of this step.

        With sigma "median" it is a collective until some rank has had tokens.
        """
        if self.local:
            raise RuntimeError("the coordinate estimator has nothing to observe")
        rollouts = list(self._rollouts(hidden, gold, lengths))
        if self.bandwidth is None:
            found = hidden.new_zeros(2, dtype=torch.float64)  # bandwidth, 1; zeros from a rank without tokens
            if rollouts:
                found[0], found[1] = median_bandwidth(torch.cat([states for states, _ in rollouts])), 1
            total, ranks = self.all_reduce(found).tolist()
            self.bandwidth = torch.tensor(total / ranks, dtype=torch.float64) if ranks else None
        if self.batch is None and self.estimator == "pointwise":
            self.batch = Moments.zeros(1, self.num_features, hidden.device)
        elif self.batch is None:
            self.batch = PositionSums(self.num_features, hidden.device)
        for states, answer in rollouts:
            phi_x, phi_y, measured = self._phi(states, answer)
            if isinstance(self.batch, Moments):
                self.batch.add(0, measured.sum(0, keepdim=True), phi_x.sum(0, keepdim=True), phi_y)
                continue
            if len(states) > (self.max_positions or 0):
                longest = f"max_positions = {self.max_positions}"
                raise ValueError(f"a completion of {len(states)} tokens is longer than {longest}")
            self.batch.add(answer.float().cpu().numpy().tobytes(), measured, phi_x, phi_y)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the observed moments over ranks and make them what ``score`` uses. Once a step, on every rank."""
        if self.batch is None:
            raise RuntimeError("reduce() needs an observe() on every rank first, be it of an empty micro-batch")
        batch, self.batch = self.batch, None
        if isinstance(batch, PositionSums):
            self._reduce_positions(batch)
            return
        new = Moments(*(self.all_reduce(tensor) for tensor in batch))
        if not new.count.any():  # no token anywhere: nothing was learnt about anything
            return
        if self.running is not None:
            self.running = Moments(
                *(tensor.to(new.count.device) for tensor in self.running)
            )  # a checkpoint's is on CPU
            decay = self.steps / (self.steps + 1) if self.steps < self.warmup_steps else self.ema_decay
            new = self.running.averaged(new, decay)
        self.running, self.steps = new, self.steps + 1

    def _reduce_positions(self, sums: PositionSums) -> None:
        """HSIC at each position that two rollouts reach on whatever rank, some positions at a time."""
        count = self.all_reduce(sums.count(self.max_positions or 0))  # (T,)
        if not count.any():
            return
        hsic = torch.zeros_like(count)  # (T,)
        end = int((count > 1).nonzero().max()) + 1 if (count > 1).any() else 0
        step = max(1, BLOCK_ELEMENTS // self.num_features**2)
        for start in range(0, end, step):
            stop = min(start + step, end)
            block = Moments(*(self.all_reduce(tensor) for tensor in sums.moments(start, stop)))
            hsic[start:stop] = block.covariance(self.center).square().sum((-1, -2))
        self.by_position, self.steps = hsic, self.steps + 1

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors; taken between steps, when no micro-batch is half observed."""
        state = {"steps": torch.tensor(self.steps)}
        if self.bandwidth is not None:
            state["bandwidth"] = self.bandwidth
        for name, part in (("phi", self.phi_of), ("running", self.running)):
            if part is not None:
                state |= {f"{name}.{field.name}": getattr(part, field.name) for field in fields(part)}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Undo everything since ``state_dict``. Raises ValueError for another number of features."""

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(name): value.clone() for key, value in state.items() if key.startswith(name)}

        phi, running = part("phi."), part("running.")
        if phi and len(phi["phase"]) != self.num_features:
            raise ValueError(f"the saved scorer has {len(phi['phase'])} features, this one {self.num_features}")
        self.phi_of = FourierFeatures(**phi) if phi else None
        self.running = Moments(**running) if running else None
        self.bandwidth = state.get("bandwidth")
        self.steps, self.batch, self.factors, self.by_position = int(state["steps"]), None, None, None

    def _score_alone(self, hidden: Tensor, gold: Tensor, lengths: Tensor) -> Tensor:
        rollouts = list(self._rollouts(hidden, gold, lengths))
        if not rollouts:
            return hidden.new_zeros(0, dtype=torch.float32)
        states, answers = zip(*rollouts)  # (T, d), (d,) each
        counts = torch.tensor([len(each) for each in states])
        if self.sigma == "median":
            bandwidth = torch.cat([token_bandwidths(each, self.sigma) for each in states])
        else:
            bandwidth = token_bandwidths(hidden, self.sigma)  # (N, 1)
        factors, which = self._factors_of(torch.stack(answers))
        all_states = hidden if self.normalize == "none" else torch.cat(states)
        assert self.phi_of is not None
        which = which.repeat_interleave(counts)
        if self.epsilon is not None:
            ridge = self.epsilon * hidden.shape[1]
            return normalized_scores(all_states, factors, which, self.phi_of, bandwidth, self.center, ridge)
        return factor_scores(all_states, factors, which, self.phi_of, bandwidth, self.center)

    def _factors_of(self, gold: Tensor) -> tuple[Tensor, Tensor]:
        """Factors (Q, d, r) of the different ones among gold (B, d), and the place (B,) of each, on the CPU.

        The last ones stay: the rollouts of a question share a gold state, and lie in several micro-batches.
        """
        keys = [state.tobytes() for state in gold.float().cpu().numpy()]
        if self.factors is None or not self.places.keys() >= set(keys):
            assert self.phi_of is not None
            rows = dict(zip(keys, range(len(keys))))  # one of each
            self.places = {key: place for place, key in enumerate(rows)}
            ridge = None if self.epsilon is None else self.epsilon * gold.shape[1]
            self.factors = gold_factors(gold[list(rows.values())], self.phi_of, self.sigma, self.center, ridge)
        return self.factors, torch.tensor([self.places[key] for key in keys])

    def _rollouts(self, hidden: Tensor, gold: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The normalised states (T, d) and gold state (d,) of each rollout that has tokens."""
        if int(lengths.sum()) != len(hidden) or len(lengths) != len(gold):
            raise ValueError(f"{len(hidden)} states and {len(gold)} gold states do not fit lengths {lengths.tolist()}")
        for states, answer in zip(hidden.split(lengths.tolist()), gold):
            if len(states):
                yield _normalized(states, answer, self.normalize)

    def _phi(self, states: Tensor, answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """fp64 features (T, D) and (D,), zero where not finite, and whether a token can be measured (T,), 1 or 0."""
        assert self.bandwidth is not None, "a batch without tokens has no bandwidth"
        if self.phi_of is None:
            self.phi_of = FourierFeatures.draw(self.features, states.shape[-1], self.num_features, self.seed)
        with torch.autocast(states.device.type, enabled=False):
            x, y = states.float(), answer.float()
            phi_of, sigma = self.phi_of.to(x), float(self.bandwidth)
            phi_x, phi_y = phi_of(x, sigma).double(), phi_of(y, sigma).double()
        measured = phi_x.isfinite().all(-1) & phi_y.isfinite().all()
        return torch.where(measured[:, None], phi_x, 0.0), torch.nan_to_num(phi_y), measured.double()


def _normalized(states: Tensor, answer: Tensor, how: Normalize) -> tuple[Tensor, Tensor]:
    """(T, d), (d,) -> the same shapes; a coordinate or state without variance becomes zeros."""
    if how == "none":
        return states, answer
    states, answer = states.float(), answer.float()
    if how == "layernorm":
        size = states.shape[-1:]
        return torch.nn.functional.layer_norm(states, size), torch.nn.functional.layer_norm(answer, size)
    finite = states[states.isfinite().all(-1)]
    mean, std = finite.mean(0), finite.std(0, correction=0)
    std = torch.where(std > 0, std, torch.inf)
    return (states - mean) / std, (answer - mean) / std
