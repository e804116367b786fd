"""Attention in one row of several sequences: packed (``optim.packing``), or sharing what they begin with
(``optim.share_prompts``).

With a mask over the whole row, s tokens cost s^2 products although most pairs may not see each other. Here every
segment of the row (what prompts begin with, the rest of a prompt, a completion, a packed sequence) asks only its own
sequence: its queries meet the keys of the segments before it and its own. On a GPU in half precision all segments go
through one call of flash attention for variable lengths, which comes with PyTorch. (FlexAttention would spare the
copies of shared keys, but compiles its kernels while the run waits.) Elsewhere segments of similar length go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa_shared"
"""``attn_implementation`` of a model: sdpa, and this where the forward pass gets a ``tree``"""
SIMILAR = 0.5  # of the longest segment of a block
LONG = 512  # tokens of a block from which skipping half of the products is worth more than short keys (on two cores)


@dataclass
class Block:
    """g segments of up to q tokens, whose sequences up to their ends have up to k."""

    queries: Tensor  # (g, q) where in the row; what is behind the end of a segment repeats something
    keys: Tensor  # (g, k) likewise
    before: Tensor  # (g,) tokens of the sequence before the segment
    first: bool  # every segment begins its sequence, so that queries and keys are the same tokens
    biases: dict[tuple[torch.dtype, int, int | None], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(segments: Sequence[tuple[Tensor, Tensor]], device: torch.device | str) -> Block:
        """Segments as (where the sequence before stands, where its own tokens stand)."""

        def rows(each: list[Tensor]) -> Tensor:
            width = max(map(len, each))
            return torch.stack([torch.cat([r, r[-1:].expand(width - len(r))]) for r in each]).to(device)

        return Block(
            rows([own for _, own in segments]),
            rows([torch.cat(each) for each in segments]),
            torch.tensor([len(before) for before, _ in segments], device=device),
            not any(len(before) for before, _ in segments),
        )

    def bias(self, dtype: torch.dtype, heads: int, window: int | None) -> Tensor:
        """0 where query i may see key j, which is one of the last ``window`` up to before + i, else -inf, for
        ``heads`` of a group. (g, 1, heads * q, k)"""
        made = dtype, heads, window
        if made not in self.biases:  # the same in every layer
            i, j = (torch.arange(n, device=self.before.device) for n in (self.queries.shape[1], self.keys.shape[1]))
            back = (self.before[:, None] + i)[..., None] - j  # (g, q, k) tokens from key to query
            hidden = back < 0 if window is None else (back < 0) | (back >= window)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self.biases[made] = bias.repeat(1, heads, 1)[:, None]
        return self.biases[made]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, dropout: float, window: int | None
    ) -> Tensor:
        """query (s, groups * heads, h), key and value (s, groups, h) -> (g * q, groups * heads, h)."""
        g, q = self.queries.shape
        groups, size = key.shape[1:]
        heads = query.shape[1] // groups
        asked = query.index_select(0, self.queries.flatten())  # (g * q, groups * heads, h)
        k, v = (
            each.index_select(0, self.keys.flatten()).view(g, -1, *each.shape[1:]).transpose(1, 2)
            for each in (key, value)
        )  # (g, groups, k, h)
        if self.first and q >= LONG and window is None and not value.is_cuda:
            asked = asked.view(g, q, -1, size).transpose(1, 2)  # (g, groups * heads, q, h)
            out = F.scaled_dot_product_attention(
                asked, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
            )
            return out.transpose(1, 2).reshape(g * q, groups * heads, -1)
        # Heads of a group stand beside each other as queries, so that their keys are not repeated.
        asked = asked.view(g, q, groups, heads, size).permute(0, 2, 3, 1, 4).reshape(g, groups, heads * q, size)
        # of the value's type: under autocast, rotation has made query and key float32 until sdpa converts them
        bias = self.bias(value.dtype, heads, window)  # (g, 1, heads * q, k)
        out = F.scaled_dot_product_attention(asked, k, v, bias, dropout_p=dropout, scale=scaling)
        return out.view(g, groups, heads, q, -1).permute(0, 3, 1, 2, 4).reshape(g * q, groups * heads, -1)


@dataclass
class Spans:
    """Segments one after the other, as variable-length attention wants them."""

    keys: Tensor | None  # (sum of k,) where in the row the keys of each segment stand; None: each sees itself alone
    query_ends: Tensor  # (segments + 1,) int32, from 0
    key_ends: Tensor  # (segments + 1,) int32, from 0
    longest_query: int
    longest_key: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None) -> Tensor:
        """query (s, heads, h), key and value (s, groups, h) -> (s, heads, h). Queries end where their keys end."""
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast does not know the operator
        if self.keys is not None:
            key, value = key.index_select(0, self.keys), value.index_select(0, self.keys)
        ends = self.query_ends, self.key_ends, self.longest_query, self.longest_key
        left = -1 if window is None else window - 1
        out: Any = varlen_attn(query, key, value, *ends, scale=scaling, window_size=(left, 0), enable_gqa=True)
        return out


@dataclass(eq=False)
class Tree:
    """A row of segments that stand one after the other, each with its own tokens once, behind the parent (an earlier
    segment, or None) that it continues. What attention needs is made when it is first asked for."""

    lengths: list[int]
    parents: list[int | None]
    device: torch.device | str = "cpu"

    def to(self, device: torch.device) -> Tree:
        return Tree(self.lengths, self.parents, device)

    @cached_property
    def segments(self) -> list[tuple[Tensor, Tensor]]:
        """Of each, where the tokens of its sequence before it stand in the row, and where its own."""
        made: list[tuple[Tensor, Tensor]] = []
        for start, length, parent in zip(accumulate(self.lengths, initial=0), self.lengths, self.parents):
            before = torch.empty(0, dtype=torch.long) if parent is None else torch.cat(made[parent])
            made.append((before, torch.arange(start, start + length)))
        return made

    @cached_property
    def blocks(self) -> tuple[list[Block], Tensor]:
        """And (s,) where in their outputs, one after the other, each token of the row is."""
        members: list[list[int]] = []
        filled = [i for i, length in enumerate(self.lengths) if length]
        for i in sorted(filled, key=lambda i: -self.lengths[i]):
            if not members or self.lengths[i] < SIMILAR * self.lengths[members[-1][0]]:
                members.append([])
            members[-1].append(i)
        blocks = [Block.of([self.segments[i] for i in each], self.device) for each in members]
        places = torch.empty(sum(self.lengths), dtype=torch.long)  # (s,)
        offset = 0
        for block, each in zip(blocks, members):
            for row, i in enumerate(each):
                first = offset + row * block.queries.shape[1]
                places[self.segments[i][1]] = torch.arange(first, first + self.lengths[i])
            offset += block.queries.numel()
        return blocks, places.to(self.device)

    @cached_property
    def spans(self) -> Spans:
        filled = [each for each in self.segments if len(each[1])]
        queries, keys = [len(own) for _, own in filled], [len(before) + len(own) for before, own in filled]
        asked, read = (
            torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=self.device) for each in (queries, keys)
        )
        at = None if queries == keys else torch.cat([torch.cat(each) for each in filled]).to(self.device)
        return Spans(at, asked, read, max(queries), max(keys))

    def sees(self, tokens: Tensor) -> Tensor:
        """Which tokens of the row some of its tokens may see, (n,) -> (n, s) bool."""
        ancestors = torch.eye(len(self.lengths), dtype=torch.bool)  # (segments, segments)
        for child, parent in enumerate(self.parents):
            if parent is not None:
                ancestors[child] |= ancestors[parent]
        owner = torch.repeat_interleave(torch.tensor(self.lengths)).to(tokens.device)  # (s,)
        index = torch.arange(len(owner), device=tokens.device)  # (s,)
        return ancestors.to(tokens.device)[owner[tokens]][:, owner] & (index <= tokens[:, None])


def takes_flash(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """What PyTorch's flash attention can do on a GPU: half precision, heads of one size, from NVIDIA's Ampere on."""
    size = value.shape[-1]
    return (
        value.is_cuda
        and value.dtype in (torch.bfloat16, torch.float16)
        and dropout == 0
        and size == key.shape[-1] == query.shape[-1]
        and size % 8 == 0
        and size <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(value.device) >= (8, 0)
    )


def knows_groups(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether a fused kernel reads keys that several heads share; without one, sdpa makes all (s, s) weights."""
    return not value.is_cuda or takes_flash(query, key, value, dropout)


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (1, heads, s, h), (1, groups, s, h) twice -> (1, s, heads, h).

    With a ``tree`` the mask, which says no more, is not looked at.
    """
    if tree is None:  # the mask has the window in it
        if attention_mask is None and not knows_groups(query, key, value, dropout):
            key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
            return out.transpose(1, 2).contiguous(), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))  # (s, heads or groups, h)
    if takes_flash(query, key, value, dropout):
        return tree.spans.attend(query, key, value, scaling=scaling, window=sliding_window)[None], None
    blocks, places = tree.blocks
    settings: dict[str, Any] = {"scaling": scaling, "dropout": dropout, "window": sliding_window}
    out = torch.cat([block.attend(query, key, value, **settings) for block in blocks])
    return out.index_select(0, places)[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
