"""How much a token's hidden state tells about the gold answer: FastHSIC (AIPO, Chen et al., ACL 2026, eq. 1).

HSIC is the squared covariance of two variables after a kernel has made it see nonlinear dependence too. Fourier
features phi(x) = sqrt(2/D) cos(Wx + b) turn the n-by-n kernel matrices into n-by-D ones:

    MI = || Phi_x^T H Phi_y ||_F^2 / (n - 1)^2,     H = I - 11^T/n

The paper does not say what the n samples of ONE hidden state are. There are three readings (the last two are in
:mod:`aipo.scorer`):

* ``coordinate``: the d coordinates of h_t and of the gold state h* are d paired scalars, as in the
  mutual-information-peaks work that AIPO builds on. A token's score depends on that token and h* alone.
* ``pointwise``: the samples are all (h_t, h*) pairs of the batch; a token scores its own share of their covariance.
* ``position``: the samples at step t are the rollouts still running at t; they share one score.

The scores of a run select and weigh tokens and keep no gradient; :func:`fast_hsic` is differentiable. Whatever cannot
be measured scores 0: a single sample, constant samples (when centred), and NaN or infinite states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from math import ceil, pi
from typing import Literal

import torch
from torch import Tensor

from aipo.config.base import Features

Sigma = float | Literal["median"]

CHUNK_ELEMENTS = 1 << 24  # size of the largest temporary: 64 MiB in fp32
CACHE_ELEMENTS = 1 << 20  # the same where a CPU's cache should hold it
RANK_TOLERANCE = 1e-14  # on eigenvalues, that is 1e-7 on singular values
REACH = 3.0  # bandwidths within which a series stands for the cosines
SERIES_TOLERANCE = 1e-8  # on its coefficients
WEIGHT_TOLERANCE = 1e-10  # on a feature's share of the kernel


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

    @cached_property
    def expansion(self) -> Expansion:
        """The same features, for p = 1, as sums over many scalars want them."""
        return Expansion.of(self)

    def to(self, like: Tensor) -> FourierFeatures:
        """The same features on the device and in the dtype of ``like``."""
        return FourierFeatures(self.frequency.to(like), self.phase.to(like), self.amplitude.to(like))

    def __call__(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """(..., p) -> (..., D)."""
        return self.amplitude * torch.cos((x / sigma) @ self.frequency + self.phase)


@dataclass(frozen=True)
class Expansion:
    """D features of scalars x, in bandwidths: phi(x) = series @ T(x / REACH), T being m Chebyshev polynomials.

    Within REACH all cosines are smooth, and m of about 23 reproduces any D of them to the rounding of fp32: sums over
    coordinates then cost m products each, not D cosines. The few coordinates of a model that lie beyond are taken as 0
    by the series, and their phi(x) - phi(0) is added. Features of no weight (half of a quadrature rule) are left out.
    """

    frequency: Tensor  # (D,)
    phase: Tensor  # (D,)
    amplitude: Tensor  # (D,)
    series: Tensor  # (D, m)

    @classmethod
    def of(cls, phi_of: FourierFeatures) -> Expansion:
        weight = phi_of.amplitude.square()
        kept = weight > WEIGHT_TOLERANCE * weight.sum()
        frequency, phase, amplitude = phi_of.frequency[0, kept], phi_of.phase[kept], phi_of.amplitude[kept]
        # A polynomial of degree K is fixed by its values at K Chebyshev nodes; the fastest cosine needs K > w REACH.
        degrees = torch.arange(32.0 + 2 * ceil(float(frequency.abs().max()) * REACH)).to(frequency)  # (K,)
        angle = (degrees + 0.5) * pi / len(degrees)  # (K,)
        values = amplitude[:, None] * torch.cos(REACH * frequency[:, None] * angle.cos() + phase[:, None])  # (D, K)
        series = values @ torch.cos(angle[:, None] * degrees) * (2 / len(degrees))  # (D, K)
        series[:, 0] /= 2
        size = series.norm(dim=0)
        last = int((size > SERIES_TOLERANCE * size.max()).nonzero().max())
        return cls(frequency, phase, amplitude, series[:, : last + 1] * alternating(last + 1).to(series))

    def to(self, like: Tensor) -> Expansion:
        return Expansion(*(part.to(like) for part in (self.frequency, self.phase, self.amplitude, self.series)))

    def beyond(self, x: Tensor) -> Tensor:
        """phi(x) - phi(0): (...) -> (D, ...)."""
        frequency, phase, amplitude = (
            part.view(-1, *[1] * x.dim()) for part in (self.frequency, self.phase, self.amplitude)
        )
        return torch.addcmul(phase, frequency, x).cos_().sub_(phase.cos()).mul_(amplitude)


def alternating(count: int) -> Tensor:
    """+ + - - + + ...: the signs with which :func:`chebyshev` returns the polynomials."""
    return 1.0 - (torch.arange(count) // 2 % 2) * 2


def chebyshev(x: Tensor, count: int) -> Tensor:
    """T_0 ... T_{count-1} times their :func:`alternating` signs, for x in [-1, 1]: (...) -> (count, ...).

    With these signs T_k = 2x T_{k-1} - T_{k-2} is one pass over the data: +-2x T_{k-1} + T_{k-2}.
    """
    basis = x.new_empty(count, *x.shape)
    basis[0] = 1
    basis[1:2] = x
    for k in range(2, count):
        torch.addcmul(basis[k - 2], x, basis[k - 1], value=2 if k % 2 else -2, out=basis[k])
    return basis


def columns_beyond(x: Tensor) -> Tensor:
    """The o coordinates that some row of x (c, d), in bandwidths, has beyond REACH, or NaN: (o,)."""
    return (~(x.abs().amax(0) <= REACH)).nonzero()[:, 0]


def near_and_far(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Scalars in bandwidths (c, d) -> x / REACH where it is within [-1, 1], else 0 (c, d); and of ``columns`` (o,),
    the :func:`columns_beyond` of these rows or more, x where it is beyond, else 0 (c, o). NaN stays NaN."""
    far = x[:, columns]
    far = torch.where(far.abs() <= REACH, 0, far)
    near = x / REACH
    near[:, columns] = (x[:, columns] - far) / REACH  # leaves 0 where it is far
    return near, far


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
    ``chunk`` tokens are held at a time; None takes as many as the cache of a CPU holds (4 MiB), or 64 MiB of a GPU.
    Sums over coordinates go through an :class:`Expansion`: the time is linear in T and d, and hardly depends on D.
    """
    phi_of = FourierFeatures.draw(features, 1, num_features, seed)
    factors, which = gold_factors(gold[None], phi_of, sigma, center), torch.zeros(len(hidden), dtype=torch.long)
    return factor_scores(hidden, factors, which, phi_of, token_bandwidths(hidden, sigma), center, chunk)


def gold_factors(
    gold: Tensor, phi_of: FourierFeatures, sigma: Sigma, center: bool, ridge: float | None = None
) -> Tensor:
    """F with F F^T = H Phi_y Phi_y^T H, that is || Phi_x^T H Phi_y || = || Phi_x^T F || for any x, of each gold state:
    (Q, d) -> fp32 (Q, d, r).

    r is the largest numerical rank, which is small (about 15) because the kernel is smooth; a factor of lower rank
    starts with columns of zeros. A gold state that cannot be measured has nothing else. In fp64, because the noise
    floor of fp32 cosines would hide how small the rank is. All states share the decompositions, as far as there is
    room for them. With a ``ridge``, F F^T is K (K + ridge)^-1 of that K instead (:mod:`aipo.mi_normalized`).
    """
    Q, d = gold.shape
    if not Q or d < 2:
        return gold.new_empty(Q, d, 0, dtype=torch.float32)
    with torch.autocast(gold.device.type, enabled=False):
        measured = gold.isfinite().all(1)[:, None]  # (Q, 1)
        samples = torch.where(measured, gold, 0).double()[:, :, None]  # (Q, d, 1)
        x = (samples / _bandwidth(samples, sigma))[:, :, 0]  # (Q, d)
        columns = columns_beyond(x)
        phi = phi_of.expansion.to(x)
        D, m = phi.series.shape
        width = D + 2 * d  # of what a column of W, and then of the factor, takes
        fitting = tokens_that_fit(2 * width * (m + len(columns)), _room(x))  # fp64 takes the place of two
        factors = [_factors(part, columns, phi, center, ridge) for part in x.split(fitting)]  # (q, d, r) each
        rank = max(part.shape[2] for part in factors)
        padded = [torch.nn.functional.pad(part, (rank - part.shape[2], 0)) for part in factors]
        return torch.where(measured[:, :, None], torch.cat(padded), 0)


def _factors(x: Tensor, columns: Tensor, phi: Expansion, center: bool, ridge: float | None) -> Tensor:
    """Gold states in bandwidths (q, d), of which ``columns`` (o,) may be beyond REACH -> fp32 (q, d, r)."""
    near, far = near_and_far(x, columns)
    # Phi_y = A W^T, A (d, m + o) being the polynomials and an indicator of each coordinate beyond. W = Q R
    # leaves A R^T, min(D, m + o) columns instead of D. A coordinate that is not beyond here has a column of zeros.
    W = torch.cat([phi.series.expand(len(x), -1, -1), phi.beyond(far).transpose(0, 1)], 2)  # (q, D, m + o)
    R = torch.linalg.qr(W, mode="r").R  # (q, min(D, m + o), m + o)
    m = phi.series.shape[1]
    factor = chebyshev(near, m).permute(1, 2, 0) @ R[:, :, :m].mT  # (q, d, min(D, m + o))
    factor[:, columns] += R[:, :, m:].mT
    # what centring leaves of equal coordinates is rounding, which differs from machine to machine, and no rank
    noise = (8 * torch.finfo(factor.dtype).eps * torch.linalg.vector_norm(factor, dim=(1, 2))) ** 2  # (q,)
    factor = _centered(factor, center)
    eigenvalue, vector = torch.linalg.eigh(factor.mT @ factor)  # ascending
    kept = eigenvalue > (RANK_TOLERANCE * eigenvalue[:, -1]).maximum(noise)[:, None]  # (q, min(D, m + o))
    rank = int(kept.sum(1).max())
    if ridge is not None:
        vector = vector / (eigenvalue.clamp(min=0) + ridge).sqrt()[:, None]
    return (factor @ (vector * kept[:, None])[:, :, kept.shape[1] - rank :]).float()


def token_bandwidths(states: Tensor, sigma: Sigma) -> Tensor:
    """One bandwidth for all of ``states`` (T, d), as :func:`factor_scores` wants it: fp32 (T, 1)."""
    return (
        torch.as_tensor(_bandwidth(states.reshape(-1, 1), sigma))
        .to(states.device, torch.float32)
        .expand(len(states), 1)
    )


def factor_scores(
    hidden: Tensor,
    factors: Tensor,
    which: Tensor,
    phi_of: FourierFeatures,
    bandwidth: Tensor,
    center: bool,
    chunk: int | None = None,
) -> Tensor:
    """|| Phi_x^T F ||_F^2 / (d - 1)^2 for every state x and the factor F of its gold state -> fp32 (N,).

    Args:
        hidden: (N, d).
        factors: (Q, d, r) of :func:`gold_factors`.
        which: (N,) on the CPU, the place of each state's factor among them.
        bandwidth: fp32 (N, 1), of each state's kernel.
        chunk: states at a time, whatever their factors; see :func:`coordinate_scores`.
    """
    N, d, r = len(hidden), *factors.shape[1:]
    scores = hidden.new_zeros(N, dtype=torch.float32)
    if not r or not N:
        return scores
    fused = hidden.is_cuda and find_spec("triton") is not None
    order = which.argsort(stable=True)  # states of one gold state follow each other
    first = 1 if center else 0  # F sums to 0 then, and the constant T_0 counts for nothing
    with torch.autocast(hidden.device.type, enabled=False):
        phi, room = phi_of.expansion.to(factors), _room(hidden)
        D, m = phi.series.shape
        for rows in order.split(chunk or tokens_that_fit(max(d, m * r) if fused else m * d + D * r, room)):
            part = rows.to(hidden.device)
            x = hidden.index_select(0, part).float()  # (c, d)
            low, high = x.amin(1), x.amax(1)  # (c,) each
            measured = (low > -torch.inf) & (high < torch.inf)  # NaN is neither
            if center:
                measured &= low < high  # constant samples score 0, not what rounding leaves of them
            x = x / bandwidth[part]
            columns = columns_beyond(x)
            near, far = near_and_far(x, columns)  # (c, d), (c, o)
            golds, counts = which[rows].unique_consecutive(return_counts=True)
            spans = list(zip(golds.tolist(), counts.tolist()))  # how many states in a row take which factor
            outer = factors[:, columns]  # (Q, o, r)
            if fused:
                from aipo.mi_kernels import chebyshev_products, squared_norms

                sums = chebyshev_products(near, first, m, factors, spans)  # (c, m - first, r)
                waves = phi.frequency, phi.phase, phi.amplitude
                norms = squared_norms(sums, far, outer, which[rows].to(part), phi.series[:, first:], waves)  # (c,)
            else:
                sums = _chebyshev_products(near, first, m, factors, spans)
                norms = torch.empty_like(scores[part])
                for some in torch.arange(len(rows)).split(chunk or tokens_that_fit(D * (r + len(columns)), room)):
                    span = slice(int(some[0]), int(some[-1]) + 1)
                    norms[span] = _squared_norms(sums[span], far[span], outer[which[rows[span]]], phi, first)
            scores[part] = torch.where(measured, norms / (d - 1) ** 2, 0)
    return _measured(scores)


def _chebyshev_products(x: Tensor, first: int, count: int, factors: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """``chebyshev(x, count)[first:] @ factor``, each factor for its span of rows: x (c, d), factors (Q, d, r) ->
    (c, count - first, r)."""
    basis = chebyshev(x, count)[first:]  # (count - first, c, d)
    parts = basis.split([length for _, length in spans], 1)
    return torch.cat([part @ factors[gold] for part, (gold, _) in zip(parts, spans)], 1).transpose(0, 1)


def _squared_norms(sums: Tensor, far: Tensor, outer: Tensor, phi: Expansion, first: int) -> Tensor:
    """|| series sums + beyond(far) outer ||_F^2: (c, m - first, r), (c, o), (c, o, r) -> (c,)."""
    product = torch.bmm(phi.series[:, first:].expand(len(sums), -1, -1), sums)  # (c, D, r)
    if far.shape[1]:
        product.baddbmm_(phi.beyond(far).transpose(0, 1), outer)
    product = product.flatten(1)
    return torch.linalg.vecdot(product, product)


def _check_pairs(x: Tensor, y: Tensor) -> None:
    if x.dim() < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"x (..., n, p) and y (..., n, q) must pair up, not {tuple(x.shape)} and {tuple(y.shape)}")


def _work_dtype(x: Tensor) -> torch.dtype:
    """fp64 stays, everything narrower is computed in fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def positive(sigma: float) -> float:
    if not sigma > 0:
        raise ValueError(f"sigma must be positive or 'median', not {sigma}")
    return float(sigma)


def _bandwidth(x: Tensor, sigma: Sigma) -> float | Tensor:
    """The number itself, or the median heuristic (..., 1, 1) of every set of samples in x (..., n, p)."""
    if sigma != "median":
        return positive(sigma)
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


def _room(like: Tensor) -> int:
    return CHUNK_ELEMENTS if like.is_cuda else CACHE_ELEMENTS


def tokens_that_fit(elements: int, room: int = CHUNK_ELEMENTS) -> int:
    return max(1, room // elements)
