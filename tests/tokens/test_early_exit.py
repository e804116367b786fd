"""Early exits of a tree against every exit as a sequence of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3ForCausalLM

from aipo.layout import MicroBatch, filler
from aipo.metrics import error_bounds
from aipo.policy import Policy
from aipo.tokens.early_exit import cumulative_information, early_exit_trees, postfix_ids
from aipo.tokens.early_exit import information_gain as gain_of
from tests.tiny import make_tiny, tiny_tokenizer

POSTFIX = [9, 8, 7]


def early_exit_batches(*args: Any, **options: Any) -> list[MicroBatch]:
    return [tree.micro_batch() for tree in early_exit_trees(*args, **options)]


def information_gain(batches: Sequence[MicroBatch], entropies: Sequence[Tensor], lengths: Tensor) -> Tensor:
    return gain_of([(micro.rows, micro.lengths) for micro in batches], entropies, lengths)


def early_exit_cost(batches: Sequence[MicroBatch], lengths: Tensor) -> float:
    """Tokens forwarded for each completion token."""
    return sum(micro.input_ids.numel() for micro in batches) / max(int(lengths.sum()), 1)


PROMPTS = [[1, 2, 3], [1, 2, 3], [1, 2, 4, 5], [6]]
COMPLETIONS = [[10, 11, 12, 13, 14, 15, 16], [10, 11, 9, 8, 7, 20], [], [30, 30]]  # the second contains the postfix
LENGTHS = torch.tensor([len(c) for c in COMPLETIONS])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen3ForCausalLM:
    folder = make_tiny(tmp_path_factory.mktemp("tiny"))
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def needed(length: int, stride: int) -> set[int]:
    """Prefix lengths that s_t needs for t = 0, stride, 2 stride, ... and the last t."""
    scored = [t for t in range(length) if t % stride == 0 or t == length - 1]
    return set(scored) | {t + 1 for t in scored}


@torch.no_grad()
def answer_entropy(model: Qwen3ForCausalLM, row: int, prefix: int) -> Tensor:
    ids = PROMPTS[row] + COMPLETIONS[row][:prefix] + POSTFIX
    p = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)  # (V,)
    return -(p * p.log()).sum()


# --- against plain forwards ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("budget", [1, 20, 30, 1000])
def test_the_gain_is_that_of_separate_sequences(model: Qwen3ForCausalLM, stride: int, budget: int) -> None:
    batches = early_exit_batches(PROMPTS, COMPLETIONS, POSTFIX, stride=stride, budget=budget)
    batches.insert(1, filler())
    policy = Policy(model, temperature=1.0, head_chunk=4)
    with torch.no_grad():
        entropies = [policy(micro, full=True)["entropy"] for micro in batches]
    for micro, entropy in zip(batches, entropies):
        for row, prefix, value in zip(micro.rows.tolist(), micro.lengths.tolist(), entropy):
            torch.testing.assert_close(value.double(), answer_entropy(model, row, prefix), atol=1e-4, rtol=0)

    gain = information_gain(batches, entropies, LENGTHS)
    assert gain.shape == (4, 7)
    for row, completion in enumerate(COMPLETIONS):
        for t in range(7):
            if {t, t + 1} <= needed(len(completion), stride):
                expected = answer_entropy(model, row, t) - answer_entropy(model, row, t + 1)
                torch.testing.assert_close(gain[row, t].double(), expected, atol=2e-4, rtol=0)
            else:
                assert gain[row, t].isnan()


# --- the layout ---------------------------------------------------------------------------------------------------

few = st.integers(1, 3)  # few ids, so that sequences begin alike and run into the postfix
rollouts = st.lists(st.tuples(st.lists(few, min_size=1, max_size=5), st.lists(few, max_size=8)), max_size=6)


@settings(max_examples=150, deadline=None)
@given(rollouts, st.lists(few, min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 60))
@pytest.mark.slow
def test_each_exit_sees_its_own_sequence(
    rows: list[tuple[list[int], list[int]]], postfix: list[int], stride: int, budget: int
) -> None:
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    found = []
    for micro in early_exit_batches(prompts, completions, postfix, stride=stride, budget=budget):
        ids, positions, mask = micro.input_ids[0], micro.position_ids[0], micro.attention_mask
        assert mask is not None
        assert mask.dtype == torch.bool
        assert mask.shape == (1, 1, len(ids), len(ids))
        sees = mask[0, 0]
        assert not sees.triu(1).any()
        assert len(ids) <= budget or len(micro.rows) == 1
        assert micro.targets.shape == micro.rows.shape == micro.lengths.shape == micro.predictors.shape
        for row, prefix, at in zip(micro.rows.tolist(), micro.lengths.tolist(), micro.predictors.tolist()):
            found.append((row, prefix))
            seen = sees[at].nonzero()[:, 0]
            assert ids[seen].tolist() == prompts[row] + completions[row][:prefix] + postfix
            assert positions[seen].tolist() == list(range(len(seen)))
            for i in seen:  # and what it sees was computed from nothing else
                assert sees[i, : i + 1].nonzero()[:, 0].tolist() == seen[seen <= i].tolist()
    assert len(set(found)) == len(found)
    assert set(found) == {(i, p) for i, c in enumerate(completions) for p in needed(len(c), stride)}


@pytest.mark.parametrize(("length", "stride", "budget"), [(7, 1, 17), (9, 1, 20), (11, 3, 22), (6, 1, 14), (5, 1, 99)])
def test_no_cut_of_a_rollout_is_cheaper(length: int, stride: int, budget: int) -> None:
    """Every way to cut its exits into rows: none has fewer rows, and none of as many has fewer tokens."""
    prompt, completion = [1, 2, 3], list(range(10, 10 + length))
    batches = early_exit_batches([prompt], [completion], POSTFIX, stride=stride, budget=budget)
    prefixes = sorted(needed(length, stride))
    costs = []
    for count in range(len(prefixes)):
        for cuts in combinations(range(1, len(prefixes)), count):
            parts = [prefixes[a:b] for a, b in zip((0, *cuts), (*cuts, len(prefixes)))]
            sizes = [len(prompt) + part[-1] + len(POSTFIX) * len(part) for part in parts]
            if max(sizes) <= budget:
                costs.append((len(parts), sum(sizes)))
    assert (len(batches), sum(m.input_ids.numel() for m in batches)) == min(costs)


def test_layout_by_hand() -> None:
    (micro,) = early_exit_batches([[1, 2]], [[3, 4]], [8, 9], stride=1, budget=100)
    assert micro.input_ids.tolist() == [[1, 2, 3, 4, 8, 9, 8, 9, 8, 9]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 3, 4, 4, 5]]
    assert micro.lengths.tolist() == [0, 1, 2]
    assert micro.predictors.tolist() == [5, 7, 9]


@pytest.mark.parametrize("budget", [8, 11])
def test_rollouts_of_a_prompt_share_a_row_and_are_not_cut_needlessly(budget: int) -> None:
    """2 + 1 tokens and 2 exits of the first, 1 and 2 of the third: 8 at most. Of the second, 11 would hold one exit."""
    prompts, completions = [[1, 2], [3, 4], [1, 2]], [[5], [6], [7]]
    batches = early_exit_batches(prompts, completions, [8], stride=1, budget=budget)
    assert [micro.rows.tolist() for micro in batches] == [[0, 0, 2, 2], [1, 1]]


def test_cost_by_hand() -> None:
    """Two rollouts of one prompt: 2 prompt tokens once, 2 + 1 trunk tokens, (3 + 2 exits) x 2 postfix tokens, of which
    the exit behind the bare prompt is the same in both."""
    batches = early_exit_batches([[1, 2]] * 2, [[3, 4], [5]], [8, 9], stride=1, budget=100)
    assert early_exit_cost(batches, torch.tensor([2, 1])) == (2 + 3 + 4 * 2) / 3
    apart = early_exit_batches([[1, 2]] * 2, [[3, 4], [5]], [8, 9], stride=1, budget=10)
    assert early_exit_cost(apart, torch.tensor([2, 1])) == (2 * 2 + 3 + 5 * 2) / 3
    assert early_exit_cost([], torch.tensor([0])) == 0


def test_nothing_to_score() -> None:
    assert early_exit_batches([], [], POSTFIX, stride=1, budget=10) == []
    assert early_exit_batches([[1]], [[]], POSTFIX, stride=1, budget=10) == []
    assert information_gain([], [], torch.tensor([0])).isnan().all()


@pytest.mark.parametrize(("postfix", "stride"), [([], 1), ([1], 0)])
def test_refused(postfix: list[int], stride: int) -> None:
    with pytest.raises(ValueError, match="stride must be at least 1"):
        early_exit_batches([[1]], [[2]], postfix, stride=stride, budget=10)


# --- the gain and the postfix -------------------------------------------------------------------------------------


def test_gain_by_hand() -> None:
    """One completion of 4 tokens, every third scored: t = 0 and t = 3, from prefixes 0, 1, 3, 4; another unscored."""
    (micro,) = early_exit_batches([[1], [2]], [[3, 4, 5, 6], []], [8], stride=3, budget=100)
    assert micro.lengths.tolist() == [0, 1, 3, 4]
    gain = information_gain([micro], [torch.tensor([2.0, 1.5, 1.0, 1.25])], torch.tensor([4, 0]))
    torch.testing.assert_close(
        gain, torch.tensor([[0.5, torch.nan, torch.nan, -0.25], [torch.nan] * 4]), equal_nan=True
    )


def test_smoothed_gain_by_hand() -> None:
    """One completion of 5 tokens, every fourth scored: t = 0 from prefixes 0, 1 and t = 4 from 3, 4, 5."""
    (micro,) = early_exit_batches([[1]], [[3, 4, 5, 6, 7]], [8], stride=4, budget=100, smoothed=True)
    assert micro.lengths.tolist() == [0, 1, 3, 4, 5]
    exits = [(micro.rows, micro.lengths)]
    gain = gain_of(exits, [torch.tensor([2.0, 1.5, 1.0, 1.25, 0.5])], torch.tensor([5]), smoothed=True)
    nan = torch.nan
    torch.testing.assert_close(gain, torch.tensor([[-0.5, nan, nan, nan, 0.625]]), equal_nan=True)


@given(st.integers(1, 12), st.integers(4, 40))
def test_gains_of_all_tokens_add_up(length: int, budget: int) -> None:
    """Sum of s_t = what the answer's entropy fell by from the question to the end."""
    batches = early_exit_batches([[1]], [list(range(2, 2 + length))], [50], stride=1, budget=budget)
    entropies = [micro.lengths.double().cos() for micro in batches]
    gain = information_gain(batches, entropies, torch.tensor([length]))
    expected = 1 - torch.tensor(float(length)).cos()
    torch.testing.assert_close(gain.sum(), expected, atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_cumulative_information_by_loops(seed: int) -> None:
    """Eq. 7 to 9 on any joint distribution of an answer and two tokens: by the chain rule the mean of the sums is
    I(y; o_1, o_2), here from its definition, and the error of the best guess lies between the bounds made of it."""
    answers, tokens = 4, 3
    draw = torch.Generator().manual_seed(seed)
    joint = -torch.rand(answers, tokens, tokens, generator=draw, dtype=torch.float64).clamp(min=1e-6).log().pow(3)
    joint /= joint.sum()  # p(y, o_1, o_2)

    def entropy(weights: Tensor) -> float:
        p = weights / weights.sum()
        return -sum(float(each) * math.log(each) for each in p if each > 0)

    paths = [(a, b) for a in range(tokens) for b in range(tokens)]
    rows, prefixes, entropies = [], [], []
    for row, (a, b) in enumerate(paths):
        for prefix, weights in enumerate((joint.sum((1, 2)), joint[:, a].sum(1), joint[:, a, b])):
            rows, prefixes, entropies = [*rows, row], [*prefixes, prefix], [*entropies, entropy(weights)]
    exits = [(torch.tensor(rows), torch.tensor(prefixes))]
    sums = cumulative_information(gain_of(exits, [torch.tensor(entropies)], torch.full((len(paths),), 2)))  # (B,)
    found = sum(float(joint[:, a, b].sum() * total) for (a, b), total in zip(paths, sums))
    information = 0.0
    for y in range(answers):
        for a, b in paths:
            p = float(joint[y, a, b])
            information += p * math.log(p / float(joint[y].sum() * joint[:, a, b].sum()))
    assert found == pytest.approx(information, abs=1e-5)
    prior = entropy(joint.sum((1, 2))) / math.log(2)
    low, high = error_bounds(prior, min(max(found / math.log(2), 0.0), prior), answers)
    error = 1 - sum(float(joint[:, a, b].max()) for a, b in paths)
    assert low - 1e-5 <= error <= high + 1e-5


def test_postfixes() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(postfix_ids(tokenizer, thinking=False)) == "\nThe answer is \\boxed{"
    assert tokenizer.decode(postfix_ids(tokenizer, thinking=True)) == "\n</think>\n\n**Final Answer**\n\\boxed{"
