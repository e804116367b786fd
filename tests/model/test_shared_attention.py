"""Attention by segments against one dense mask over the whole row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from aipo.layout import shared_prompt_batches
from aipo.model.shared_attention import Tree, forward

HEADS, GROUPS, SIZE = 6, 2, 4


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int | None]]:
    """Lengths of segments (some are empty) and which segment each continues."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any))
    parents = [draw(st.none() | st.integers(0, i - 1)) if i else None for i in range(len(lengths))]
    return lengths, parents


def dense(lengths: list[int], parents: list[int | None]) -> Tensor:
    """Token by token: it sees itself, what stands before it in its segment, and all of the segments before. (s, s)"""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    sees = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    for segment, (start, length) in enumerate(zip(starts, lengths)):
        for token in range(start, start + length):
            sees[token, start : token + 1] = True
            above = parents[segment]
            while above is not None:
                sees[token, starts[above] : starts[above] + lengths[above]] = True
                above = parents[above]
    return sees


@given(trees(), st.integers(0, 2**16))
@settings(deadline=None)
def test_equal_to_a_dense_mask_with_gradients(tree: tuple[list[int], list[int | None]], seed: int) -> None:
    generator, s = torch.Generator().manual_seed(seed), sum(tree[0])
    query, key, value = (
        torch.randn(1, heads, s, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    weight = torch.randn(1, s, HEADS, SIZE, generator=generator, dtype=torch.float64)
    ours, _ = forward(nn.Module(), query, key, value, None, tree=Tree.of(*tree), scaling=0.3)  # (1, s, heads, h)
    repeated = [each.repeat_interleave(HEADS // GROUPS, 1) for each in (key, value)]
    theirs = F.scaled_dot_product_attention(query, *repeated, attn_mask=dense(*tree), scale=0.3).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad((weight * ours).sum(), (query, key, value)),
        torch.autograd.grad((weight * theirs).sum(), (query, key, value)),
    )


@given(trees())
@settings(deadline=None)
def test_blocks_hold_every_token_once_and_little_else(tree: tuple[list[int], list[int | None]]) -> None:
    lengths, parents = tree
    made = Tree.of(lengths, parents)
    asked = torch.cat([block.queries.flatten() for block in made.blocks])
    assert asked[made.places].tolist() == list(range(sum(lengths)))
    assert len(asked) <= 2 * sum(lengths)
    assert sum(len(block.before) for block in made.blocks) == sum(length > 0 for length in lengths)


def test_micro_batches_say_the_same_by_tree_and_by_mask() -> None:
    prompts, completions = [[1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 5]], [[5, 6, 7, 8], [7], [8, 9], []]
    for budget in (5, 9, 100):
        for micro in shared_prompt_batches(prompts, completions, budget=budget):
            s = micro.input_ids.numel()
            query, key, value = (torch.randn(1, heads, s, SIZE) for heads in (HEADS, GROUPS, GROUPS))
            module = nn.Module()
            module.num_key_value_groups = HEADS // GROUPS  # type: ignore[assignment]
            by_tree, _ = forward(module, query, key, value, micro.attention_mask, tree=micro.tree)
            by_mask, _ = forward(module, query, key, value, micro.attention_mask)
            torch.testing.assert_close(by_tree, by_mask)
