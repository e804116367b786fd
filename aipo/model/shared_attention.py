"""Attention in a row where sequences share their beginnings (``optim.share_prompts``).

With a mask over the whole row, s tokens cost s^2 products although most pairs may not see each other. Here every
segment of the row (what prompts begin with, the rest of a prompt, a completion) asks only its own sequence: its
queries meet the keys of the segments before it and its own, segments of similar length together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa_shared"
"""``attn_implementation`` of a model: sdpa, and this where the forward pass gets a ``tree``"""
SIMILAR = 0.5  # of the longest segment of a block


@dataclass
class Block:
    """g segments of up to q tokens, whose sequences up to their ends have up to k."""

    queries: Tensor  # (g, q) where in the row; what is behind the end of a segment repeats something
    keys: Tensor  # (g, k) likewise
    before: Tensor  # (g,) tokens of the sequence before the segment
    biases: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(segments: Sequence[tuple[list[int], list[int]]]) -> Block:
        """Segments as (where the sequence before stands, where its own tokens stand)."""
        q, k = (max(map(len, each)) for each in ([own for _, own in segments], [a + own for a, own in segments]))
        return Block(
            torch.tensor([own + own[-1:] * (q - len(own)) for _, own in segments]),
            torch.tensor([a + own + own[-1:] * (k - len(a + own)) for a, own in segments]),
            torch.tensor([len(a) for a, _ in segments]),
        )

    def bias(self, dtype: torch.dtype, heads: int) -> Tensor:
        """0 where query i may see key j <= before + i, else -inf, for ``heads`` of a group. (g, 1, heads * q, k)"""
        if (dtype, heads) not in self.biases:  # the same in every layer
            i, j = (torch.arange(n, device=self.before.device) for n in (self.queries.shape[1], self.keys.shape[1]))
            hidden = j > (self.before[:, None] + i)[..., None]  # (g, q, k)
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self.biases[dtype, heads] = bias.repeat(1, heads, 1)[:, None]
        return self.biases[dtype, heads]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
        """query (s, heads, h), key and value (s, groups, h) -> (g * q, heads, h)."""
        g, q = self.queries.shape
        groups, size = key.shape[1:]
        heads = query.shape[1] // groups
        # Heads of a group stand beside each other as queries, so that their keys are not repeated.
        asked = query.index_select(0, self.queries.flatten())  # (g * q, heads, h)
        asked = asked.view(g, q, groups, heads, size).permute(0, 2, 3, 1, 4).reshape(g, groups, heads * q, size)
        k, v = (
            each.index_select(0, self.keys.flatten()).view(g, -1, groups, size).transpose(1, 2) for each in (key, value)
        )  # (g, groups, k, h)
        # of the value's type: under autocast, rotation has made query and key float32 until sdpa converts them
        bias = self.bias(value.dtype, heads)  # (g, 1, heads * q, k)
        out = F.scaled_dot_product_attention(asked, k, v, bias, dropout_p=dropout, scale=scaling)
        return out.view(g, groups, heads, q, size).permute(0, 3, 1, 2, 4).reshape(g * q, groups * heads, size)


@dataclass
class Tree:
    """A row of segments, each with its own tokens once, and which blocks compute them."""

    blocks: list[Block]
    places: Tensor  # (s,) where in the outputs of all blocks, one after the other, each token of the row is

    @staticmethod
    def of(lengths: Sequence[int], parents: Sequence[int | None]) -> Tree:
        """Segments that stand one after the other in the row, each behind the parent that it continues."""
        before: list[list[int]] = []  # of each segment, where the sequence before it stands
        own: list[list[int]] = []
        for start, length, parent in zip(accumulate(lengths, initial=0), lengths, parents):
            before.append([] if parent is None else before[parent] + own[parent])
            own.append(list(range(start, start + length)))
        blocks: list[list[int]] = []
        for segment in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
            if not blocks or lengths[segment] < SIMILAR * lengths[blocks[-1][0]]:
                blocks.append([])
            blocks[-1].append(segment)
        made = [Block.of([(before[i], own[i]) for i in block]) for block in blocks]
        places = torch.empty(sum(lengths), dtype=torch.long)  # (s,)
        offset = 0
        for block, segments in zip(made, blocks):
            for row, segment in enumerate(segments):
                first = offset + row * block.queries.shape[1]
                places[own[segment]] = torch.arange(first, first + lengths[segment])
            offset += block.queries.numel()
        return Tree(made, places)

    def to(self, device: torch.device) -> Tree:
        moved = [
            Block(block.queries.to(device), block.keys.to(device), block.before.to(device)) for block in self.blocks
        ]
        return Tree(moved, self.places.to(device))


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (1, heads, s, h), (1, groups, s, h) twice -> (1, s, heads, h).

    With a ``tree`` the mask, which says the same, is not looked at.
    """
    if tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))  # (s, heads or groups, h)
    out = torch.cat([block.attend(query, key, value, scaling, dropout) for block in tree.blocks])
    return out.index_select(0, tree.places)[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
