"""Attention entropy: how concentrated the attention is from which a token is predicted.

Tokens of low entropy (*anchors*) rest on a few tokens before them, those of high entropy (*explorers*) gather from
many (arXiv 2605.07660). Fused attention gives no weights, so those of a few rows at a time are made again from the
queries and keys that it is called with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aipo.advantage import zscore
from aipo.model.shared_attention import Tree


class AttentionEntropy:
    """Entropies of attention rows of the forward pass made inside ``with``, whichever attention the model uses::

        with AttentionEntropy(model, micro.predictors) as attention:
            policy(micro, ...)
        attention.entropy  # (N,)

    A token's attention is the row of the position that *predicts* it, where its hidden state and entropy are taken
    too: the context that made it, before the token itself is seen. (Where prompts are shared, the last token of a
    completion has no position of its own.)

    No parameter is used and nothing is saved for backward: it may go round the training forward, and gradient
    checkpointing or ZeRO-3 see no difference. Attention sinks and capped logits are not known to it.

    Args:
        model: a transformers model, alone or within other modules.
        positions: (N,) rows wanted, in the flattened (r * s) input; sequences are padded on the right.
        layers: decoder layers averaged over, negative ones counted from the last.
        chunk: rows whose weights exist at a time: (chunk, heads, s) float32.
    """

    def __init__(
        self, model: nn.Module, positions: Tensor, *, layers: tuple[int, ...] = (-1,), chunk: int = 64
    ) -> None:
        attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
        depth = len(attentions)
        if not layers or not all(-depth <= layer < depth for layer in layers):
            raise ValueError(f"attention layers {layers} of a model with {depth} of them")
        self.watched = {attentions[layer] for layer in layers}
        self.positions, self.chunk = positions, chunk
        self.found: dict[nn.Module, Tensor] = {}  # (N,) of each layer

    def __enter__(self) -> AttentionEntropy:
        self.implementation = next(iter(self.watched)).config._attn_implementation  # type: ignore[union-attr]
        # eager attention is no entry of the table; sdpa computes the same from the same mask
        self.attend = ALL_ATTENTION_FUNCTIONS.get(self.implementation, sdpa_attention_forward)
        ALL_ATTENTION_FUNCTIONS[self.implementation] = self._forward  # goes before the entry that all instances share
        return self

    def __exit__(self, *_: object) -> None:
        del ALL_ATTENTION_FUNCTIONS[self.implementation]

    @property
    def entropy(self) -> Tensor:
        """(N,) float32 in [0, 1]: mean over heads and layers of the row's entropy / log(tokens that it can see).

        0 for a row that sees one token.
        """
        if len(self.found) < len(self.watched):
            raise RuntimeError("no forward pass went through the watched layers' attention function")
        return torch.stack([*self.found.values()]).mean(0)

    def _forward(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if module in self.watched:
            with torch.no_grad():
                scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
                told = {name: kwargs.get(name) for name in ("position_ids", "sliding_window", "tree")}
                visible = _Visible(attention_mask, key, **told)
                self.found[module] = self._rows(query, key, visible, scaling)
        return self.attend(module, query, key, value, attention_mask, **kwargs)

    def _rows(self, query: Tensor, key: Tensor, visible: _Visible, scaling: float) -> Tensor:
        """query (r, heads, s, h), key (r, kv heads, s, h) after rotation -> (N,)"""
        entropy = torch.empty(len(self.positions), device=query.device)  # (N,)
        row, column = self.positions // query.shape[2], self.positions % query.shape[2]  # (N,), (N,)
        for r in range(len(query)):
            queries, keys = query[r].transpose(0, 1), key[r].float()  # (s, heads, h), (kv heads, s, h)
            for part in (row == r).nonzero()[:, 0].split(self.chunk):
                at = column[part]  # (c,)
                entropy[part] = row_entropy(queries[at].float(), keys, visible(r, at), scaling)
        return entropy


class _Visible:
    """(c, s) bool: what rows of the attention matrix may see, as the attention function is told."""

    def __init__(
        self,
        mask: Tensor | None,
        key: Tensor,
        *,
        position_ids: Tensor | None,
        sliding_window: int | None,
        tree: Tree | None,
    ) -> None:
        self.mask = mask if mask is not None and mask.dim() == 4 else None  # (r or 1, 1, s, s), bool or additive
        self.window, self.tree = sliding_window, tree
        self.index = torch.arange(key.shape[2], device=key.device)  # (s,)
        self.positions = self.index[None] if position_ids is None else position_ids  # (r or 1, s)
        jumps = self.positions.diff(prepend=self.positions[:, :1] - 1) != 1  # where another packed sequence begins
        self.sequence = jumps.cumsum(1)  # (r or 1, s)

    def __call__(self, row: int, at: Tensor) -> Tensor:
        if self.mask is not None and self.tree is None:
            rows = self.mask[row % len(self.mask), 0, at]  # (c, s)
            return rows if rows.dtype == torch.bool else rows == 0
        if self.tree is not None:
            visible = self.tree.sees(at)  # (c, s)
        else:  # Causal within the sequence; flash attention is told no more. Padding on the right is never seen.
            sequence = self.sequence[row % len(self.sequence)]  # (s,)
            visible = (self.index <= at[:, None]) & (sequence[at, None] == sequence)  # (c, s)
        positions = self.positions[row % len(self.positions)]  # (s,)
        return visible if self.window is None else visible & (positions[at, None] - positions < self.window)


def row_entropy(query: Tensor, key: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Entropy of softmax(q k^T scaling) over the visible keys / log of their number, mean over heads, in [0, 1].

    Args:
        query: (c, heads, h); key: (kv heads, s, h), each for heads / kv heads adjacent heads; visible: (c, s) bool.

    Returns:
        (c,), 0 where one key is visible.
    """
    grouped = query.unflatten(1, (len(key), -1))  # (c, kv heads, heads / kv heads, h)
    logits = torch.einsum("ckgh,ksh->ckgs", grouped, key) * scaling
    weights = logits.masked_fill_(~visible[:, None, None], -torch.inf).softmax(-1)
    entropy = torch.special.entr(weights).sum(-1).mean((1, 2))  # (c,)
    seen = visible.sum(-1)  # (c,)
    return torch.where(seen > 1, entropy / seen.log(), 0.0).clamp(0, 1)


def attention_weights(entropy: Tensor, lengths: Tensor, *, strength: float = 1.0, favour: str = "anchors") -> Tensor:
    """Soft weights of tokens: 2 sigmoid(-strength z), z the z-score of the entropy within its sequence.

    From 1 for all tokens (``strength=0``) to a split of the sequence at its mean entropy (large strengths). For
    :func:`aipo.advantage.weight_tokens`, which brings them to mean 1.

    Args:
        entropy: (B, T) normalised attention entropies, NaN where not measured (weight 1); lengths: (B,).
        favour: ``anchors``, of low entropy, or ``explorers``, of high.

    Returns:
        (B, T) float64 in (0, 2).
    """
    if favour not in ("anchors", "explorers") or strength < 0:
        raise ValueError(f"unknown favour {favour!r} or negative strength {strength}")
    sign = 1 if favour == "explorers" else -1
    return 2 * torch.sigmoid(sign * strength * zscore(entropy, lengths))
