"""Rollouts laid out for forward passes: the two shapes of per-token values, and the micro-batches.

*Padded* is ``(B, T)``: one row a rollout, completion tokens first. *Ragged* is ``(N,)``: the completion tokens of
several rollouts one after another, N the sum of their lengths; the model and the mutual information work on it,
because nothing in it is padding. Lengths, never ``ids != pad``, say what is a token: pad and end token may be the
same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aipo.model.shared_attention import Tree

TokenIds = Sequence[Sequence[int]]
"""of several sequences"""


@dataclass
class MicroBatch:
    """Some rollouts laid out for one forward pass; ``rows`` is empty for a filler that only keeps ranks in step."""

    rows: Tensor  # (b,) positions in Rollouts
    input_ids: Tensor  # (r, s): r = b rows padded on the right, or r = 1 packed row
    position_ids: Tensor  # (r, s): start at 0 for every sequence
    predictors: Tensor  # (N,) where in the flattened (r * s) states each completion token is predicted
    targets: Tensor  # (N,) completion token ids
    lengths: Tensor  # (b,) completion lengths
    tree: Tree | None = None  # of a row that holds several sequences, or a prompt for several completions
    attention_mask: Tensor | None = None  # (1, 1, s, s) bool; None where a tree says it, and where rows are padded:
    # on the right, which no token of a causal model looks at

    def with_empty(self, rows: Tensor) -> MicroBatch:
        """The same with more rollouts (e,) of which no token is laid out."""
        more = rows.to(self.rows)
        return replace(
            self, rows=torch.cat([self.rows, more]), lengths=torch.cat([self.lengths, torch.zeros_like(more)])
        )

    def rows_of(self, padded: Tensor) -> Tensor:
        """(B, T) values of the whole batch -> (b, t) of this micro-batch's rollouts, on its device."""
        width = max(int(self.lengths.max()), 1) if len(self.lengths) else 1
        return padded[self.rows.cpu(), :width].to(self.lengths.device)

    def ragged_of(self, padded: Tensor) -> Tensor:
        """(B, T) values of the whole batch -> (N,) of this micro-batch's tokens, on its device."""
        return unpad(padded[self.rows.cpu()], self.lengths.cpu()).to(self.lengths.device)

    def grid(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Ragged (N,) values, or those at the K true positions of ``mask`` (N,) -> (b, t), 0 elsewhere; keeps the
        gradient."""
        if mask is not None:
            values = values.new_zeros(len(mask)).masked_scatter(mask, values)  # (N,)
        return pad(values, self.lengths)

    def write(self, padded: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
        """The reverse of :meth:`ragged_of`: (N,), or (K,) at the true positions of ``mask`` (N,), into (B, T)."""
        if not len(self.rows):
            return
        if mask is not None:
            values = values.new_zeros(len(mask)).masked_scatter(mask, values)  # (N,)
        rows = self.rows.cpu()
        own = padded[rows]  # (b, T)
        own[token_grid(self.lengths.cpu(), own.shape[1])] = values.to(own)
        padded[rows] = own

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor | Tree) else v for k, v in vars(self).items()}
        return MicroBatch(**moved)


def pad(flat: Tensor, lengths: Tensor, value: float = 0) -> Tensor:
    """Ragged (N, ...) -> padded (B, T, ...), T the longest length (at least 1)."""
    width = max(int(lengths.max()) if len(lengths) else 0, 1)
    out = flat.new_full((len(lengths), width, *flat.shape[1:]), value)  # (B, T, ...)
    out[token_grid(lengths, width)] = flat
    return out


def unpad(padded: Tensor, lengths: Tensor) -> Tensor:
    """Padded (B, T, ...) -> ragged (N, ...)."""
    return padded[token_grid(lengths, padded.shape[1])]


def token_grid(lengths: Tensor, width: int) -> Tensor:
    """True where a column is a token of its row. (B, width)"""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def micro_batches(prompts: TokenIds, completions: TokenIds, *, budget: int, packing: bool) -> list[MicroBatch]:
    """Cut sequences into micro-batches of at most ``budget`` tokens, padding included (one sequence always fits).

    Sequences are sorted by length, longest first, so that padding is little and memory peaks in the first.
    """
    sizes = [len(p) + len(c) for p, c in zip(prompts, completions)]
    groups: list[list[int]] = []
    used = longest = 0
    for row in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        cost = used + sizes[row] if packing else (len(groups[-1]) + 1) * longest if groups else 0
        if not groups or cost > budget:
            groups.append([])
            used, longest = 0, sizes[row]
        groups[-1].append(row)
        used += sizes[row]
    return [_lay_out(rows, [prompts[i] for i in rows], [completions[i] for i in rows], packing) for rows in groups]


def shared_prompt_batches(prompts: TokenIds, completions: TokenIds, *, budget: int) -> list[MicroBatch]:
    """Micro-batches in which every distinct prompt stands once, whatever the number of its completions.

    A micro-batch is one row of at most ``budget`` tokens (one sequence always fits); what all its prompts begin with
    also stands once. A token attends to what comes before it in its own sequence, so states, log-probabilities and
    gradients are those of separate sequences, up to rounding. The last token of a completion predicts nothing and is
    left out.
    """
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(tuple(prompt), []).append(row)
    groups: list[list[int]] = []
    used = 0
    for prompt, rows in sorted(rows_of.items(), key=lambda item: -len(item[0])):
        seen = False  # the prompt stands in the present micro-batch
        for row in sorted(rows, key=lambda i: -len(completions[i])):
            cost = len(completions[row]) + (0 if seen else len(prompt))
            if not groups or used + cost > budget:
                groups.append([])
                used, cost = 0, len(completions[row]) + len(prompt)
            groups[-1].append(row)
            used, seen = used + cost, True
    return [_share(rows, [prompts[i] for i in rows], [completions[i] for i in rows]) for rows in groups]


def _share(rows: list[int], prompts: TokenIds, completions: TokenIds) -> MicroBatch:
    """One row made of a tree of segments: what all prompts begin with, the rest of each, their completions."""
    distinct = sorted({tuple(prompt) for prompt in prompts})
    common = 0
    if len(distinct) > 1:  # sorted, so what the first and the last share, all share
        shortest = min(map(len, distinct)) - 1  # every prompt keeps its last token, which predicts
        first, last = distinct[0], distinct[-1]
        common = next((i for i in range(shortest) if first[i] != last[i]), shortest)
    tokens: list[int] = []  # s, as are positions
    positions: list[int] = []
    sizes: list[int] = []  # of segments
    parents: list[int | None] = []

    def add(ids: Sequence[int], start: int, parent: int | None) -> int:
        tokens.extend(ids)
        positions.extend(range(start, start + len(ids)))
        sizes.append(len(ids))
        parents.append(parent)
        return len(parents) - 1

    root = add(distinct[0][:common], 0, None)
    ends: dict[tuple[int, ...], tuple[int, int]] = {}  # prompt -> its segment, and where its last token stands
    for each in distinct:
        ends[each] = (add(each[common:], common, root), len(tokens) - 1)
    predictors: list[int] = []
    for prompt, completion in zip(prompts, completions):
        parent, end = ends[tuple(prompt)]
        predictors += [end, *range(len(tokens), len(tokens) + len(completion) - 1)][: len(completion)]
        add(completion[:-1], len(prompt), parent)
    return MicroBatch(
        rows=torch.tensor(rows, dtype=torch.long),
        input_ids=torch.tensor([tokens]),
        position_ids=torch.tensor([positions]),
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor([t for c in completions for t in c], dtype=torch.long),
        lengths=torch.tensor([len(c) for c in completions], dtype=torch.long),
        tree=Tree(sizes, parents),
    )


def filler() -> MicroBatch:
    """One token and nothing to learn from: what a rank runs when the others have more micro-batches than it has."""
    return _lay_out([], [[0]], [[]], packing=True)


def _lay_out(rows: list[int], prompts: TokenIds, completions: TokenIds, packing: bool) -> MicroBatch:
    sequences = [torch.tensor([*p, *c], dtype=torch.long) for p, c in zip(prompts, completions)]
    sizes = torch.tensor([len(s) for s in sequences])  # (b,)
    width = int(sizes.max())
    if packing:
        starts = sizes.cumsum(0) - sizes  # (b,)
        input_ids = torch.cat(sequences)[None]  # (1, s)
        position_ids = torch.cat([torch.arange(n) for n in sizes])[None]  # (1, s)
    else:
        starts = torch.arange(len(sequences)) * width  # (b,)
        input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # (b, s)
        position_ids = torch.arange(width).expand(len(sequences), -1).contiguous()  # (b, s)
    return MicroBatch(
        rows=torch.tensor(rows, dtype=torch.long),
        input_ids=input_ids,
        position_ids=position_ids,
        predictors=torch.cat(
            [start + len(p) - 1 + torch.arange(len(c)) for start, p, c in zip(starts, prompts, completions)]
        ),
        targets=torch.tensor([t for c in completions for t in c], dtype=torch.long),
        lengths=torch.tensor([len(c) for c in completions], dtype=torch.long)[: len(rows)],
        tree=Tree(sizes.tolist(), [None] * len(sizes)) if packing else None,
    )
