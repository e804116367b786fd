"""How much a token's hidden state tells about the gold answer: FastHSIC (AIPO, Chen et al., ACL 2026, eq. 1).

HSIC is the squared covariance of two variables after a kernel has made it see nonlinear dependence too. Fourier
features phi(x) = sqrt(2/D) cos(Wx + b) turn the n-by-n kernel matrices into n-by-D ones:

    MI = || Phi_x^T H Phi_y ||_F^2 / (n - 1)^2,     H = I - 11^T/n

The paper does not say what the n samples of ONE hidden state are. Three readings are here:

* ``coordinate``: the d coordinates of h_t and of the gold state h* are d paired scalars, as in the code of the
  mutual-information-peaks work that AIPO builds on. A token's score depends on that token and h* alone.
* ``pointwise``: the samples are all (h_t, h*) pairs of the batch; a token scores its own share of their covariance.
* ``position``: the samples at step t are the rollouts still running at t; they share one score.

Scores only select tokens, so no gradient is kept. Whatever cannot be measured scores 0: a single sample, constant
samples (when centred), and NaN or infinite states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from math import ceil, isqrt, pi
from typing import Literal, get_args

import torch
from torch import Tensor

from aipo.config import POSITION_ELEMENTS

Features = Literal["random", "orthogonal", "quadrature"]
Sigma = float | Literal["median"]
Estimator = Literal["coordinate", "pointwise", "position"]
Normalize = Literal["none", "layernorm", "zscore"]

CHUNK_ELEMENTS = 1 << 24  # size of the largest temporary: 64 MiB in fp32
RANK_TOLERANCE = 1e-14  # on eigenvalues, that is 1e-7 on singular values


@dataclass(frozen=True)
class FourierFeatures:
    """phi(x) = amplitude * cos(x W / sigma + phase): phi(x).phi(x') approximates exp(-|x - x'|^2 / 2 sigma^2)."""

    frequency: Tensor  # (p, D)
    phase: Tensor  # (D,)
    amplitude: Tensor  # (D,)

    @classmethod
    def draw(cls, kind: Features, dim: int, num_features: int, seed: int) -> FourierFeatures:
        """Features of unit bandwidth for ``dim``-vectors, drawn on the CPU so that every device gets the same ones.

        ``random``: W ~ N(0, 1), b ~ U(0, 2 pi). ``orthogonal``: the same marginals with orthogonal frequencies
        (Yu et al., 2016); for scalars nothing can be orthogonal, and it is ``random`` in law. ``quadrature``:
        Gauss-Hermite nodes as frequencies, scalars only; good to 1 % for |x - x'| up to sqrt(2D) bandwidths, beyond
        which the kernel, by then 0, is not reproduced.
        """
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, not {num_features}")
        if kind == "quadrature":
            if dim != 1:
                raise ValueError(f"quadrature features exist for scalars only, not for vectors of size {dim}")
            return cls._gauss_hermite(num_features)
        generator = torch.Generator().manual_seed(seed)
        phase = 2 * pi * torch.rand(num_features, generator=generator, dtype=torch.float64)
        if kind == "random":
            frequency = torch.randn(dim, num_features, generator=generator, dtype=torch.float64)
        elif kind == "orthogonal":
            width = min(dim, num_features)
            shape = (2, ceil(num_features / dim), dim, width)
            directions, norms = torch.randn(shape, generator=generator, dtype=torch.float64)  # (blocks, dim, width)
            q, r = torch.linalg.qr(directions)
            # The sign makes q uniform over rotations; the norms are those of Gaussian vectors.
            blocks = q * r.diagonal(dim1=1, dim2=2).sign()[:, None] * norms.norm(dim=1, keepdim=True)
            frequency = blocks.transpose(0, 1).reshape(dim, -1)[:, :num_features]
        else:
            raise ValueError(f"features must be random, orthogonal or quadrature, not {kind!r}")
        return cls(frequency, phase, torch.full_like(phase, (2 / num_features) ** 0.5))

    @classmethod
    def _gauss_hermite(cls, nodes: int) -> FourierFeatures:
        # Golub-Welsch: the nodes are the eigenvalues of the Jacobi matrix, the weights come from its eigenvectors.
        off_diagonal = torch.arange(1, nodes, dtype=torch.float64).sqrt()
        node, vector = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
        weight = vector[0].square()
        # Nodes come as +-w of equal weight: one cos and one sin of w replace both. An odd rule has a node at 0.
        w, pair = node[ceil(nodes / 2) :], (2 * weight[ceil(nodes / 2) :]).sqrt()
        zero, middle = node.new_zeros(nodes % 2), weight[nodes // 2 : ceil(nodes / 2)].sqrt()
        return cls(
            torch.cat([zero, w, w])[None],
            torch.cat([zero, torch.zeros_like(w), torch.full_like(w, -pi / 2)]),
            torch.cat([middle, pair, pair]),
        )

    def to(self, like: Tensor) -> FourierFeatures:
        """The same features on the device and in the dtype of ``like``."""
        return FourierFeatures(self.frequency.to(like), self.phase.to(like), self.amplitude.to(like))

    def __call__(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """(..., p) -> (..., D)."""
        return self.amplitude * torch.cos((x / sigma) @ self.frequency + self.phase)


def median_bandwidth(x: Tensor) -> Tensor:
    """Median heuristic: median of the non-zero pairwise distances of ``x`` (n, p) over sqrt(2), or 1 if there are none.

    Uses at most 1000 points, drawn with a fixed seed. Points that are not finite are left out.
    """
    if len(x) > 1000:
        x = x[torch.randint(len(x), (1000,), generator=torch.Generator().manual_seed(0)).to(x.device)]
    x = x[x.isfinite().all(-1)]
    distance = torch.nn.functional.pdist(x.to(_work_dtype(x)))
    distance = distance[distance > 0]
    return distance.median() / 2**0.5 if len(distance) else distance.new_ones(())


def fast_hsic(
    x: Tensor,
    y: Tensor,
    *,
    num_features: int,
    sigma: Sigma,
    seed: int = 0,
    center: bool = True,
    features: Features = "random",
) -> Tensor:
    """HSIC of paired samples by Fourier features (AIPO eq. 1): x (..., n, p), y (..., n, q) -> (...).

    ``sigma`` is the Gaussian kernel's bandwidth in the units of x and y; "median" takes the median heuristic of each
    variable by itself. x and y share W and b (b alone if p differs from q). Low-precision inputs are computed in fp32.
    ``center=False`` drops H: a diagnostic, the value then says little about dependence.
    Raises ValueError for different n, and for quadrature features of vectors.
    """
    _check_pairs(x, y)
    n, dtype = x.shape[-2], torch.promote_types(_work_dtype(x), _work_dtype(y))
    with torch.autocast(x.device.type, enabled=False):
        phi = []  # (..., n, D) each
        for samples in (x.to(dtype), y.to(dtype)):
            phi_of = FourierFeatures.draw(features, samples.shape[-1], num_features, seed).to(samples)
            phi.append(_centered(phi_of(samples, _bandwidth(samples, sigma)), center))
        hsic = (phi[0].transpose(-1, -2) @ phi[1]).square().sum((-1, -2)) / max(n - 1, 1) ** 2
    return _measured(hsic) if n > 1 else torch.zeros_like(hsic)


def exact_hsic(x: Tensor, y: Tensor, *, sigma: Sigma) -> Tensor:
    """tr(K H L H) / (n - 1)^2 with Gaussian kernels, the O(n^2) reference of :func:`fast_hsic`; same shapes."""
    _check_pairs(x, y)
    n, dtype = x.shape[-2], torch.promote_types(_work_dtype(x), _work_dtype(y))
    with torch.autocast(x.device.type, enabled=False):
        kernel = []  # HKH and HLH, (..., n, n)
        for samples in (x.to(dtype), y.to(dtype)):
            scaled = samples / _bandwidth(samples, sigma)
            distance = torch.cdist(scaled, scaled, compute_mode="donot_use_mm_for_euclid_dist")
            rows = torch.exp(-distance.square() / 2)
            rows = rows - rows.mean(-1, keepdim=True)
            kernel.append(rows - rows.mean(-2, keepdim=True))
        hsic = (kernel[0] * kernel[1]).sum((-1, -2)) / max(n - 1, 1) ** 2
    return _measured(hsic) if n > 1 else torch.zeros_like(hsic)


@torch.no_grad()
def coordinate_scores(
    hidden: Tensor,
    gold: Tensor,
    *,
    num_features: int,
    sigma: Sigma,
    seed: int = 0,
    center: bool = True,
    features: Features = "random",
    chunk: int | None = None,
) -> Tensor:
    """One HSIC per token, the n = d coordinates being the samples: hidden (T, d), gold (d,) -> fp32 (T,).

    Equal to ``fast_hsic(hidden[t, :, None], gold[:, None], ...)`` for every t, except that "median" takes one
    bandwidth for all of ``hidden`` (a median for every token would cost more than the scores).
    ``chunk`` tokens are held at a time; None takes as many as 64 MiB hold.
    """
    phi_of = FourierFeatures.draw(features, 1, num_features, seed)
    return _coordinate_scores(hidden, gold, phi_of, sigma, center, chunk)


def _coordinate_scores(
    hidden: Tensor, gold: Tensor, phi_of: FourierFeatures, sigma: Sigma, center: bool, chunk: int | None
) -> Tensor:
    scores = hidden.new_zeros(len(hidden), dtype=torch.float32)
    n = gold.shape[-1]
    if n < 2 or not len(hidden):
        return scores
    with torch.autocast(hidden.device.type, enabled=False):
        # Phi_y is the same for every token and of tiny numerical rank, the kernel being smooth. With H Phi_y = Q F^T
        # truncated to its r directions, || Phi_x^T H Phi_y || = || Phi_x^T F ||: D r products a coordinate, not D^2.
        # In fp64, because the noise floor of fp32 cosines would hide how small the rank is.
        gold = gold.double()[:, None]
        phi_y = _centered(phi_of.to(gold)(gold, _bandwidth(gold, sigma)), center)  # (d, D)
        if not phi_y.isfinite().all():
            return scores
        eigenvalue, vector = torch.linalg.eigh(phi_y.T @ phi_y)
        factor = (phi_y @ vector[:, eigenvalue > RANK_TOLERANCE * eigenvalue[-1]]).float()  # (d, r)

        like = scores  # fp32 on the right device
        frequency = (phi_of.frequency.to(like).T / _bandwidth(hidden.reshape(-1, 1), sigma)).float()  # (D, 1)
        phase, amplitude = phi_of.phase.to(like)[:, None], phi_of.amplitude.to(like)  # (D, 1), (D,)
        chunk = chunk or _tokens_that_fit(len(amplitude) * n)
        for start in range(0, len(hidden), chunk):
            tokens = hidden[start : start + chunk].float()  # (c, d)
            phi_x = torch.addcmul(phase, tokens[:, None, :], frequency).cos_()  # (c, D, d)
            if center:
                # H makes any constant vanish; doing so before the product keeps its rounding error small.
                phi_x -= phi_x[..., :1].clone()
            product = phi_x.flatten(0, 1) @ factor  # (c D, r)
            per_feature = product.square().sum(-1).view(len(tokens), -1)  # (c, D)
            scores[start : start + chunk] = per_feature @ amplitude.square() / (n - 1) ** 2
    return _measured(scores)


def pointwise_scores(
    hidden: Tensor,
    gold: Tensor,
    lengths: Tensor,
    *,
    num_features: int,
    sigma: Sigma,
    seed: int = 0,
    center: bool = True,
    features: Features = "random",
) -> Tensor:
    """Each token's share phi_c(h_t)^T C psi_c(h*) of ||C||_F^2, C the cross-covariance over this batch.

    hidden (N, d) holds the tokens of B rollouts one after another, gold (B, d), lengths (B,) with sum N -> fp32 (N,).
    The scores average to HSIC (n - 1)/n and may be negative. "median" takes the tokens' bandwidth for both variables.
    """
    scorer = TokenScorer(
        estimator="pointwise",
        features=features,
        num_features=num_features,
        sigma=sigma,
        center=center,
        seed=seed,
    )
    return scorer._fit_score(hidden, gold, lengths)


def position_scores(
    hidden: Tensor,
    gold: Tensor,
    lengths: Tensor,
    *,
    num_features: int,
    sigma: Sigma,
    seed: int = 0,
    center: bool = True,
    features: Features = "random",
) -> Tensor:
    """HSIC over the rollouts still running at step t, shared by all of them; shapes as :func:`pointwise_scores`.

    A step that fewer than two rollouts reach scores 0.
    """
    scorer = TokenScorer(
        estimator="position",
        features=features,
        num_features=num_features,
        sigma=sigma,
        center=center,
        seed=seed,
        max_positions=max(1, int(lengths.max())),
    )
    return scorer._fit_score(hidden, gold, lengths)


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


class TokenScorer:
    """Scores the completion tokens of a run, holding what must outlive a step: the draws and the running covariance.

    ``local`` says that a rollout's scores depend on that rollout alone (coordinate). Then ``score`` is all there is,
    and it can be called on the hidden states of the very forward that is back-propagated. Otherwise a step takes two
    passes over its micro-batches: ``observe`` each, ``reduce`` once, ``score`` each, on every rank.

    Arguments beyond those of :func:`fast_hsic`:
        normalize: "layernorm" gives every state zero mean and unit variance over its coordinates; "zscore" does so for
            every coordinate over the rollout's tokens (h* with the same shift and scale). "none" takes raw states.
        sigma: with "median", coordinate finds the bandwidths of every rollout anew; the others fix one for the run,
            the mean over ranks of the first micro-batch's, for both variables.
        token_chunk: tokens held at a time by the coordinate estimator; None takes as many as 64 MiB hold.
        ema_decay, warmup_steps: pointwise averages the moments behind C over steps, plainly during ``warmup_steps``
            and then by a moving average. With 0 and 0 every step's C is its own.
        max_positions: the longest completion; only position needs it. It takes 8 T D^2 bytes, 1 GiB at most.
        all_reduce: sums a tensor over ranks, in place, and returns it.
    Raises ValueError for an unknown choice, quadrature features of vectors, and position moments over the limit.
    """

    def __init__(
        self,
        *,
        estimator: Estimator = "coordinate",
        features: Features = "random",
        num_features: int = 256,
        sigma: Sigma = 50.0,
        center: bool = True,
        normalize: Normalize = "none",
        token_chunk: int | None = None,
        ema_decay: float = 0.9,
        warmup_steps: int = 10,
        max_positions: int | None = None,
        seed: int = 0,
        all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        if estimator not in get_args(Estimator):
            raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}, not {estimator!r}")
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be one of {', '.join(get_args(Normalize))}, not {normalize!r}")
        if estimator != "coordinate" and features == "quadrature":
            raise ValueError(f"quadrature features exist for scalars only: the {estimator} estimator has vectors")
        if estimator == "position":
            if max_positions is None:
                raise ValueError("the position estimator needs max_positions, the longest completion")
            if max_positions * num_features**2 > POSITION_ELEMENTS:
                raise ValueError(
                    f"{max_positions} positions with {num_features} features need over 1 GiB; "
                    f"take at most {isqrt(POSITION_ELEMENTS // max_positions)} features"
                )
        self.estimator, self.features, self.num_features, self.sigma = estimator, features, num_features, sigma
        self.center, self.normalize, self.token_chunk, self.seed = center, normalize, token_chunk, seed
        self.ema_decay, self.warmup_steps, self.all_reduce = ema_decay, warmup_steps, all_reduce
        self.sets = max_positions if estimator == "position" and max_positions else 1
        self.bandwidth = None if sigma == "median" else torch.tensor(_positive(sigma), dtype=torch.float64)
        # Vectors get their draw when their size is known.
        self.phi_of = FourierFeatures.draw(features, 1, num_features, seed) if self.local else None
        self.batch: Moments | None = None  # sums over this step's micro-batches so far
        self.running: Moments | None = None  # what scores are made from
        self.steps = 0

    @property
    def local(self) -> bool:
        return self.estimator == "coordinate"

    @torch.no_grad()
    def score(self, hidden: Tensor, gold: Tensor, lengths: Tensor) -> Tensor:
        """hidden (N, d): states of B rollouts one after another; gold (B, d); lengths (B,), sum N -> fp32 (N,)."""
        scores = [hidden.new_zeros(0, dtype=torch.float32)]
        if self.local:
            assert self.phi_of is not None
            for states, answer in self._rollouts(hidden, gold, lengths):
                scores.append(
                    _coordinate_scores(states, answer, self.phi_of, self.sigma, self.center, self.token_chunk)
                )
            return torch.cat(scores)
        if self.running is None:
            raise RuntimeError(f"the {self.estimator} estimator scores after observe() and reduce()")
        covariance = self.running.covariance(self.center)  # (P, D, D)
        hsic = covariance.square().sum((-1, -2))  # (P,)
        mean_x, mean_y = self.running.means(self.center)  # (P, D) each
        for states, answer in self._rollouts(hidden, gold, lengths):
            phi_x, phi_y, measured = self._phi(states, answer)
            if self.estimator == "position":
                score = hsic[: len(states)]
            else:
                score = (phi_x - mean_x) @ (covariance[0] @ (phi_y - mean_y[0]))
            scores.append((score * measured).float())
        return torch.cat(scores)

    @torch.no_grad()
    def observe(self, hidden: Tensor, gold: Tensor, lengths: Tensor) -> None:
        """Add a micro-batch (shapes as ``score``; it may be empty) to the moments of this step.

        The first one of a run with sigma "median" is a collective.
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
        if self.batch is None:
            self.batch = Moments.zeros(self.sets, self.num_features, hidden.device)
        for states, answer in rollouts:
            phi_x, phi_y, measured = self._phi(states, answer)
            if self.estimator == "pointwise":
                self.batch.add(0, measured.sum(0, keepdim=True), phi_x.sum(0, keepdim=True), phi_y)
                continue
            if len(states) > self.sets:
                raise ValueError(f"a completion of {len(states)} tokens is longer than max_positions = {self.sets}")
            step = _tokens_that_fit(self.num_features**2)
            for t in range(0, len(states), step):
                self.batch.add(t, measured[t : t + step], phi_x[t : t + step], phi_y)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the observed moments over ranks and make them what ``score`` uses. Once a step, on every rank."""
        if self.batch is None:
            raise RuntimeError("reduce() needs an observe() on every rank first, be it of an empty micro-batch")
        new, self.batch = Moments(*(self.all_reduce(tensor) for tensor in self.batch)), None
        if self.estimator == "pointwise" and self.running is not None:
            if not new.count.any():
                return
            decay = self.steps / (self.steps + 1) if self.steps < self.warmup_steps else self.ema_decay
            new = self.running.averaged(new, decay)
        self.running, self.steps = new, self.steps + 1

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
        self.steps, self.batch = int(state["steps"]), None

    def _fit_score(self, hidden: Tensor, gold: Tensor, lengths: Tensor) -> Tensor:
        self.observe(hidden, gold, lengths)
        self.reduce()
        return self.score(hidden, gold, lengths)

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


def _check_pairs(x: Tensor, y: Tensor) -> None:
    if x.dim() < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"x (..., n, p) and y (..., n, q) must pair up, not {tuple(x.shape)} and {tuple(y.shape)}")


def _work_dtype(x: Tensor) -> torch.dtype:
    """fp64 stays, everything narrower is computed in fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def _positive(sigma: float) -> float:
    if not sigma > 0:
        raise ValueError(f"sigma must be positive or 'median', not {sigma}")
    return float(sigma)


def _bandwidth(x: Tensor, sigma: Sigma) -> float | Tensor:
    """The number itself, or the median heuristic (..., 1, 1) of every set of samples in x (..., n, p)."""
    if sigma != "median":
        return _positive(sigma)
    sets = x.reshape(-1, *x.shape[-2:])
    return torch.stack([median_bandwidth(samples) for samples in sets]).view(*x.shape[:-2], 1, 1)


def _centered(phi: Tensor, center: bool) -> Tensor:
    """H Phi for (..., n, D). Taking the first row off beforehand makes constant features exactly 0."""
    if not center:
        return phi
    phi = phi - phi[..., :1, :]
    return phi - phi.mean(-2, keepdim=True)


def _measured(score: Tensor) -> Tensor:
    return torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0)


def _tokens_that_fit(elements: int) -> int:
    return max(1, CHUNK_ELEMENTS // elements)
