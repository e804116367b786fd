"""How a latent of IIB-LPO enters the model while it generates (arXiv 2601.05870).

What the sources leave open, and what we do: the matrices that carry z into the model are random and fixed, kept in
the latent's checkpoint and weighted by one ``scale``. The authors' are the same in effect: drawn at N(0, 0.01^2) and
meant to be trained, but no gradient reaches them through the engine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from aipo.errors import UserError

LAST_LAYERS = 4  # that the residual rule adds to

Rule = Literal["norm_kv", "residual"]


class Projections(nn.Module):
    """z into the model: random matrices with orthonormal columns (or rows), so sized that a z of unit scale gives
    coordinates of unit scale.

    ``norm`` and ``residual`` (width, latent) serve all layers; ``keys`` and ``values`` (layers, kv_width, latent) are
    one a layer.
    """

    norm: Tensor
    residual: Tensor
    keys: Tensor
    values: Tensor

    def __init__(self, width: int, layers: int, kv_width: int, latent: int) -> None:
        super().__init__()

        def matrix(outputs: int) -> Tensor:
            gain = math.sqrt(max(outputs / latent, 1))
            return nn.init.orthogonal_(torch.empty(outputs, latent), gain=gain)

        self.register_buffer("norm", matrix(width))
        self.register_buffer("residual", matrix(width))
        self.register_buffer("keys", torch.stack([matrix(kv_width) for _ in range(layers)]))
        self.register_buffer("values", torch.stack([matrix(kv_width) for _ in range(layers)]))


@dataclass(frozen=True)
class Injection:
    """Latents z (B, latent) for a batch of requests, and how they change the forward of each token they act on.

    They act from the last token of the prompt on, so the first new token is drawn under z already, with a strength
    ``gamma(t) = 2^(-t / half_life)`` at the t-th new token (from 0; 1 throughout without a half-life).

    ``norm_kv``: the output of every RMSNorm as wide as the model is multiplied by ``1 + scale * gamma(t) * W z``, and
    each layer's KV cache begins with one pair made of z, at no position, that weighs in attention as much as
    ``scale * rms(z)`` tokens of its key would: it vanishes with scale or z, which a plain pair of zeros would not.

    ``residual``: ``scale * gamma(t) * W z`` is added to the last position after each of the last four layers, as in
    the authors' code, where ``scale`` is 0.01 * sqrt(latent) = 0.11 and gamma is 1.
    """

    rule: Rule
    projections: Projections
    z: Tensor
    scale: float
    half_life: float | None = None

    def acts_on(self, row: int) -> bool:
        """Whether this row's forward differs from the plain one at all."""
        return self.scale != 0 and bool(self.z[row].any())

    def rows(self, rows: Tensor) -> Injection:
        return replace(self, z=self.z[rows])

    def to(self, device: torch.device) -> Injection:
        """A copy there; the projections are the caller's own, and `Module.to` would move them away."""
        return replace(self, projections=copy.deepcopy(self.projections).to(device), z=self.z.to(device))

    def strength(self, t: int) -> float:
        return self.scale * (1.0 if self.half_life is None else 2 ** (-t / self.half_life))

    def prepend(self, cache: DynamicCache) -> None:
        """Put the pairs of z before what the cache holds, under ``norm_kv``."""
        if self.rule != "norm_kv":
            return
        for layer, key, value in zip(cache.layers, self.projections.keys, self.projections.values, strict=True):
            if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
                raise UserError("branch.latent: norm_kv needs full attention in every layer: use residual or none")
            batch, heads, _, size = layer.keys.shape
            pair = [(self.z @ each.T).reshape(batch, heads, 1, size).to(layer.keys.dtype) for each in (key, value)]
            layer.keys = torch.cat([pair[0], layer.keys], dim=2)  # (B, heads, 1 + S, size)
            layer.values = torch.cat([pair[1], layer.values], dim=2)

    def attention_mask(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, S) of ones and zeros -> as it is or, under ``norm_kv``, (B, 1, 1, 1 + S) to be added for one query."""
        if self.rule != "norm_kv":
            return mask
        weight = abs(self.scale) * self.z.square().mean(-1, keepdim=True).sqrt()  # (B, 1)
        added = torch.zeros_like(mask, dtype=weight.dtype).masked_fill(mask == 0, torch.finfo(dtype).min)  # (B, S)
        return torch.cat([weight.log(), added], dim=1)[:, None, None].to(dtype)

    @contextmanager
    def hooks(self, model: nn.Module, t: int) -> Iterator[None]:
        """Within this, a forward of the t-th token (B, 1) is changed by z.

        Raises UserError for a model without RMSNorm, under ``norm_kv``.
        """
        matrix = self.projections.norm if self.rule == "norm_kv" else self.projections.residual
        change = (self.strength(t) * (self.z @ matrix.T))[:, None]  # (B, 1, width)

        def modulate(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return output * (1 + change).to(output.dtype)

        def add(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] + change.to(output[0].dtype), *output[1:])
            return output + change.to(output.dtype)

        if self.rule == "norm_kv":
            handles = [m.register_forward_hook(modulate) for m in model.modules() if _is_rms_norm(m, change.shape[-1])]
        else:
            layers = list(model.base_model.layers)  # type: ignore[union-attr, arg-type]
            handles = [layer.register_forward_hook(add) for layer in layers[-LAST_LAYERS:]]
        if not handles:
            raise UserError("branch.latent: norm_kv needs a model with RMSNorm: use residual or none")
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _is_rms_norm(module: nn.Module, width: int) -> bool:
    return type(module).__name__.endswith("RMSNorm") and module.weight.shape == (width,)
