"""Attention by segments against one dense mask over the whole row."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from aipo.model import shared_attention
from aipo.model.shared_attention import Tree, forward, takes_flash

HEADS, GROUPS, SIZE = 6, 2, 4
Drawn = tuple[list[int], list[int | None]]


@st.composite
def trees(draw: st.DrawFn) -> Drawn:
    """Lengths of segments (some are empty) and which segment each continues."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
    parents = [draw(st.none() | st.integers(0, i - 1)) if i else None for i in range(len(lengths))]
    return lengths, parents


def dense(lengths: list[int], parents: list[int | None], window: int | None) -> Tensor:
    """Token by token: it sees itself, what stands before it in its segment, and all of the segments before, or the
    last ``window`` of all these. (s, s)"""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    sees = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    before: list[list[int]] = []
    for start, length, parent in zip(starts, lengths, parents):
        above = [] if parent is None else before[parent] + [*range(starts[parent], starts[parent] + lengths[parent])]
        before.append(above)
        for token in range(start, start + length):
            seen = [*above, *range(start, token + 1)]
            sees[token, seen[-(window or len(seen)) :]] = True
    return sees


def varlen(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, most: int, most_keys: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What ``torch.nn.attention.varlen.varlen_attn`` says that it does, a segment at a time."""
    left, right = window_size
    assert right == 0
    assert enable_gqa
    assert query_ends.dtype == key_ends.dtype == torch.int32
    out = []
    for (a, b), (c, d) in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
        assert 0 < b - a <= most
        assert d - c <= most_keys
        k, v = (each[c:d].repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        back = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)  # the last sees the last
        hidden = (back < 0) | (back > left) if left >= 0 else back < 0
        logits = scale * torch.einsum("qhd,khd->hqk", query[a:b], k)
        out.append(torch.einsum("hqk,khd->qhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(out)


def tensors(s: int, seed: int, size: int = SIZE, **kind: Any) -> list[Tensor]:
    """Queries, keys, values, and the weight of each output in the objective."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, s, size) for heads in (HEADS, GROUPS, GROUPS)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    weight = torch.randn(made[0].transpose(1, 2).shape, generator=generator, dtype=torch.float64).to(**kind)
    return [*(each.to(**kind).requires_grad_() for each in made), weight]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["blocks", "long blocks", "spans"])
@given(trees(), st.none() | st.integers(1, 20), st.integers(0, 2**16))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equal_to_a_dense_mask_with_gradients(
    monkeypatch: pytest.MonkeyPatch, by: str, tree: Drawn, window: int | None, seed: int
) -> None:
    """``spans`` is the way of a GPU, with the operator that PyTorch has for GPUs alone written out."""
    monkeypatch.setattr(shared_attention, "takes_flash", lambda *_: by == "spans")
    monkeypatch.setattr(shared_attention, "varlen_attn", varlen)
    monkeypatch.setattr(shared_attention, "LONG", 1 if by == "long blocks" else 512)
    query, key, value, weight = tensors(sum(tree[0]), seed)
    ours, _ = forward(nn.Module(), query, key, value, None, tree=Tree(*tree), scaling=0.3, sliding_window=window)
    repeated = [each.repeat_interleave(HEADS // GROUPS, 1) for each in (key, value)]
    mask = dense(*tree, window)
    theirs = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)  # (1, s, heads, h)
    torch.testing.assert_close(
        torch.autograd.grad((weight * ours).sum(), (query, key, value)),
        torch.autograd.grad((weight * theirs).sum(), (query, key, value)),
    )
    if window is None:
        assert torch.equal(Tree(*tree).sees(torch.arange(len(mask))), mask)


@pytest.mark.parametrize("grouped", [True, False])
def test_padded_rows_are_causal_with_keys_of_groups_repeated_or_not(
    monkeypatch: pytest.MonkeyPatch, grouped: bool
) -> None:
    """Repeated as on a GPU without flash attention, whose other kernels know no groups."""
    monkeypatch.setattr(shared_attention, "knows_groups", lambda *_: grouped)
    query, key, value, weight = tensors(11, 0)
    module = nn.Module()
    module.num_key_value_groups = HEADS // GROUPS  # type: ignore[assignment]
    ours, _ = forward(module, query, key, value, None, scaling=0.3)
    theirs, _ = forward(nn.Module(), query, key, value, None, tree=Tree([11], [None]), scaling=0.3)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad((weight * ours).sum(), (query, key, value)),
        torch.autograd.grad((weight * theirs).sum(), (query, key, value)),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention for variable lengths needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("tree", [([70, 300, 1, 129], [None] * 4), ([50, 60, 200, 7, 300], [None, 0, 1, 1, 0])])
def test_flash_attention_is_as_near_to_float64_as_blocks_are(tree: Drawn, window: int | None) -> None:
    made = Tree(*tree).to(torch.device("cuda"))

    def run(dtype: torch.dtype) -> list[Tensor]:
        query, key, value, weight = tensors(sum(tree[0]), 0, 64, dtype=dtype, device="cuda")
        assert takes_flash(query, key, value, 0.0) == (dtype == torch.bfloat16)
        out, _ = forward(nn.Module(), query, key, value, None, tree=made, scaling=0.2, sliding_window=window)
        return [out, *torch.autograd.grad((weight * out).sum(), (query, key, value))]

    for half, exact in zip(run(torch.bfloat16), run(torch.float64)):
        torch.testing.assert_close(half.double(), exact, rtol=0, atol=0.03 * float(exact.abs().max()))


@given(trees())
@settings(deadline=None)
def test_blocks_hold_every_token_once_and_little_else(tree: Drawn) -> None:
    lengths, parents = tree
    blocks, places = Tree(lengths, parents).blocks
    asked = torch.cat([block.queries.flatten() for block in blocks])
    assert asked[places].tolist() == list(range(sum(lengths)))
    assert len(asked) <= 2 * sum(lengths)
    assert sum(len(block.before) for block in blocks) == sum(length > 0 for length in lengths)
