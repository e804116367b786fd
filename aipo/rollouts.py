"""The one value that flows through a training step, and the micro-batches that it is cut into.

Two layouts of per-token values are used. *Padded* is ``(B, T)``: one row a rollout, completion tokens first.
*Ragged* is ``(N,)``: the completion tokens of several rollouts one after another, N the sum of their lengths;
the model and the mutual information work on it, because nothing in it is padding.
Lengths, never ``ids != pad``, say what is a token: pad and end token may be the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aipo.datasets import Problem
from aipo.rollout.base import Completion


@dataclass
class Rollouts:
    """B = Q * group_size completions of this rank's Q questions; those of one question are adjacent."""

    problems: list[Problem]  # Q
    prompts: list[list[int]]  # Q token-id lists
    completions: list[Completion]  # B
    group_size: int
    ids: Tensor  # (B,) unique over ranks, the same whatever their number
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))  # (B,) in [0, 1]
    correct: Tensor = field(default_factory=lambda: torch.empty(0))  # (B,) bool
    texts: list[str] = field(default_factory=list)  # B
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # (B,)
    used: Tensor = field(default_factory=lambda: torch.empty(0))  # (B,) bool: takes part in the update

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(c.token_ids) for c in self.completions], dtype=torch.long)  # (B,)

    @property
    def logp_engine(self) -> Tensor:
        """Sampling log-probabilities that the engine reported, padded. (B, T)"""
        flat = torch.tensor([p for c in self.completions for p in c.logprobs], dtype=torch.float32)
        return pad(flat, self.lengths)


@dataclass
class MicroBatch:
    """Some rollouts laid out for one forward pass; ``rows`` is empty for a filler that only keeps ranks in step."""

    rows: Tensor  # (b,) positions in Rollouts
    input_ids: Tensor  # (r, s): r = b rows padded on the right, or r = 1 packed row
    position_ids: Tensor  # (r, s): start at 0 for every sequence
    attention_mask: Tensor | None  # (r, s), or None when packed: the positions tell sequences apart
    predictors: Tensor  # (N,) where in the flattened (r * s) states each completion token is predicted
    targets: Tensor  # (N,) completion token ids
    lengths: Tensor  # (b,) completion lengths

    def to(self, device: torch.device) -> MicroBatch:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
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


def micro_batches(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, budget: int, packing: bool
) -> list[MicroBatch]:
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


def filler() -> MicroBatch:
    """One token and nothing to learn from: what a rank runs when the others have more micro-batches than it has."""
    return _lay_out([], [[0]], [[]], packing=True)


def _lay_out(
    rows: list[int], prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], packing: bool
) -> MicroBatch:
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
        attention_mask=None if packing else token_grid(sizes, width).long(),
        predictors=torch.cat(
            [start + len(p) - 1 + torch.arange(len(c)) for start, p, c in zip(starts, prompts, completions)]
        ),
        targets=torch.tensor([t for c in completions for t in c], dtype=torch.long),
        lengths=torch.tensor([len(c) for c in completions], dtype=torch.long)[: len(rows)],
    )
