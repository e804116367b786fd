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

from dataclasses import dataclass
from math import ceil, pi
from typing import Literal

import torch
from torch import Tensor

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
    return stream_coordinate_scores(hidden, gold, phi_of, sigma, center, chunk)


def stream_coordinate_scores(
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
        chunk = chunk or tokens_that_fit(len(amplitude) * n)
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


def tokens_that_fit(elements: int) -> int:
    return max(1, CHUNK_ELEMENTS // elements)
