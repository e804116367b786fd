"""One token after another for a batch of sequences, with a KV cache that grows or one that stays where it is.

On a CPU a cache that is as long as the sequences costs least. On a GPU a small model spends most of a step in starting
kernels, so there the cache has a fixed size and the whole forward is replayed as one CUDA graph: no compiler is needed,
and capturing takes as long as a few steps. (Not where rollouts are drawn in a thread beside the training.)
"""

from __future__ import annotations

import threading
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aipo.rollout.injection import Injection

ROOM = 256  # tokens that a fixed cache takes at first beyond the prompts; then it doubles
PAYS_FROM = 64  # tokens still to come from which a graph is captured
GROUPED = "sdpa_grouped"
"""``attn_implementation`` of a model: sdpa, that for one new token reads shared keys once"""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (B, heads, new, h), (B, groups, S, h) twice -> (B, new, heads, h).

    With a mask sdpa repeats keys and values for every head. The heads of a group can ask like so many tokens instead,
    as long as the mask is the same for all: where one token is new.
    """
    (rows, heads, new, size), groups = query.shape, key.shape[1]
    if new > 1 or heads == groups or attention_mask is None or attention_mask.shape[1] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    asked = query.reshape(rows, groups, heads // groups, size)
    out = F.scaled_dot_product_attention(asked, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, sdpa_mask)


def forward(
    model: Any, ids: Tensor, mask: Tensor, cache: DynamicCache, injection: Injection | None = None, t: int = 0
) -> Tensor:
    """Logits (B, V) after the last of the new ``ids`` (B, new); ``mask`` (B, S) covers the cached tokens too. With an
    injection there is one new token; the next, which it predicts, is the completion's ``t``-th from 0."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # (B, new)
    if injection is not None:
        mask = injection.attention_mask(mask, model.dtype)
    with nullcontext() if injection is None else injection.hooks(model, t):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        )
    return output.logits[:, -1]


class Growing:
    """``step`` feeds a token to each sequence that is left; ``keep`` drops the others.

    Args:
        cache: of the prompts, a row for each sequence.
        mask: (B, S), 0 at padding on the left.
    """

    def __init__(self, model: Any, cache: DynamicCache, mask: Tensor, injection: Injection | None) -> None:
        self.model, self.cache, self.mask, self.injection = model, cache, mask, injection
        self.t = 0

    def keep(self, rows: Tensor) -> None:
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)
        self.injection = None if self.injection is None else self.injection.rows(rows)

    def step(self, tokens: Tensor) -> Tensor:
        """(b,) -> logits (b, V)."""
        self.t += 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)  # (b, S + t)
        return forward(self.model, tokens[:, None], self.mask, self.cache, self.injection, self.t)


class Fixed:
    """As :class:`Growing`, in a cache of fixed size: of ``most`` tokens in the end, and of half the rows once half of
    them are done. In between, rows that are done are computed and ignored."""

    graphs = True  # until capturing one has failed in this process

    def __init__(self, model: Any, cache: DynamicCache, mask: Tensor, *, most: int) -> None:
        self.model, self.most, self.length = model, most, mask.shape[1]
        self.rows = torch.arange(len(mask), device=mask.device)  # (b,) of the sequences that are left
        self.ids = torch.zeros_like(mask[:, :1])  # (B, 1)
        self.positions = mask.sum(dim=1, keepdim=True) - 1  # (B, 1)
        self.mask = mask.bool()[:, None, None]  # (B, 1, 1, S)
        self.cache: Any = cache
        self._lay_out()

    def keep(self, rows: Tensor) -> None:
        self.rows = self.rows[rows]
        if 2 * len(self.rows) <= len(self.ids):
            self._lay_out()

    def step(self, tokens: Tensor) -> Tensor:
        """(b,) -> logits (b, V)."""
        if self.length == self.mask.shape[-1]:
            self._lay_out()
        self.ids[self.rows, 0] = tokens
        self.positions += 1
        self.mask[..., self.length] = True
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        self.length += 1
        return self.logits[self.rows]

    def _lay_out(self) -> None:
        """Move the rows that are left into a cache of their own, with room for more tokens."""
        size = min(max(2 * self.length, self.length + ROOM), self.most)
        size += -size % 8  # attention kernels want masks aligned
        old, self.cache = self.cache.layers, StaticCache(self.model.config, max_cache_len=size)
        for layer, new in zip(old, self.cache.layers, strict=True):
            keys, values = (each[self.rows, :, : self.length] for each in (layer.keys, layer.values))
            layer.keys = layer.values = None  # one layer at a time is there twice
            new.lazy_initialization(keys, values)
            new.keys[:, :, : self.length], new.values[:, :, : self.length] = keys, values
        room = self.mask.new_zeros(len(self.rows), 1, 1, size - self.length)
        self.mask = torch.cat([self.mask[self.rows, ..., : self.length], room], dim=-1)  # (B, 1, 1, size)
        self.ids, self.positions = self.ids[self.rows], self.positions[self.rows]
        self.rows = torch.arange(len(self.rows), device=self.rows.device)
        # a capture fails if another thread waits for the device meanwhile, as the training does
        may = self.ids.is_cuda and Fixed.graphs and threading.current_thread() is threading.main_thread()
        self.graph = self._captured() if may and size - self.length >= PAYS_FROM else None
        self._rewind()

    def _rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    def _forward(self) -> Tensor:
        return self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            logits_to_keep=1,
        ).logits[:, -1]

    def _captured(self) -> Any:
        """The forward as a graph that writes ``logits`` (B, V); None, with a warning, where it cannot be captured."""
        stream, graph, current = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):  # libraries choose kernels and take their workspace
                    self._rewind()
                    self._forward()
            current.wait_stream(stream)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own threads ask the device
                self.logits = self._forward()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # which a capture that fails does not do
            Fixed.graphs = False
            warnings.warn(f"generation goes on without CUDA graphs, and slower: {error}", stacklevel=2)
            return None
        return graph


def fits(config: Any) -> bool:
    """Whether :class:`Fixed` knows the model's cache: full attention in every layer."""
    return all(type(layer) is StaticLayer for layer in StaticCache(config, max_cache_len=1).layers)
