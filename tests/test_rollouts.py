"""Layouts of one step's sequences: nothing lost, nothing twice, every token predicted from the right place."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aipo.layout import MicroBatch, filler, micro_batches, pad, shared_prompt_batches, token_grid, unpad
from aipo.problems.datasets import Problem
from aipo.record.batches import read_batch, rebuild, write_batch
from aipo.rollout import Completion
from aipo.rollouts import Rollouts, deal

lengths_lists = st.lists(st.integers(0, 6), max_size=6)
sequences = st.lists(
    st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=9), st.lists(st.integers(0, 99), max_size=9)),
    max_size=8,
)


# --- padded and ragged --------------------------------------------------------------------------------------------


def test_pad_by_hand() -> None:
    padded = pad(torch.tensor([1, 2, 3]), torch.tensor([2, 0, 1]), value=-1)
    assert padded.tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert token_grid(torch.tensor([2, 0, 1]), 3).tolist() == [[True, True, False], [False] * 3, [True, False, False]]


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.sampled_from([(), (3,)]), st.sampled_from([torch.float32, torch.long, torch.bool]))
def test_pad_and_unpad_round_trip(rows: list[int], tail: tuple[int, ...], dtype: torch.dtype) -> None:
    lengths = torch.tensor(rows, dtype=torch.long)
    flat = (torch.arange(1, sum(rows) * (3 if tail else 1) + 1).reshape(sum(rows), *tail)).to(dtype)
    padded = pad(flat, lengths)
    assert padded.shape == (len(rows), max([*rows, 1]), *tail)
    assert padded.dtype == dtype
    assert torch.equal(unpad(padded, lengths), flat)
    wider = torch.nn.functional.pad(padded, (*[0, 0] * len(tail), 0, 2))  # columns that no row reaches
    assert torch.equal(unpad(wider, lengths), flat)


def test_unpad_carries_the_gradient_to_its_tokens_only() -> None:
    padded = torch.zeros(2, 3, requires_grad=True)
    unpad(padded, torch.tensor([1, 3])).sum().backward()
    assert padded.grad is not None
    assert padded.grad.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_rollouts_lengths_and_engine_logprobs() -> None:
    completions = [
        Completion([7, 0], [-1.0, -2.0], "stop"),
        Completion([], [], "stop"),
        Completion([0], [-3.0], "length"),
    ]
    rollouts = Rollouts([Problem("1", "q", "a")], [[1, 2]], completions, group_size=3, ids=torch.arange(3))
    assert rollouts.lengths.tolist() == [2, 0, 1]  # token 0 may be the padding id: lengths decide
    assert rollouts.logp_engine.tolist() == [[-1, -2], [0, 0], [-3, 0]]


# --- micro-batches ------------------------------------------------------------------------------------------------


def spans(micro: MicroBatch, sizes: list[int], packing: bool) -> list[slice]:
    """Where each sequence lies in the flattened (r * s) input."""
    width, start, out = micro.input_ids.shape[1], 0, []
    for i, size in enumerate(sizes):
        first = start if packing else i * width
        out.append(slice(first, first + size))
        start += size
    return out


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(sequences, st.integers(1, 60), st.booleans())
def test_micro_batches(rows: list[tuple[list[int], list[int]]], budget: int, packing: bool) -> None:
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    micros = micro_batches(prompts, completions, budget=budget, packing=packing)
    order = [row for micro in micros for row in micro.rows.tolist()]
    assert sorted(order) == list(range(len(rows)))  # each row exactly once
    sizes = [len(p) + len(c) for p, c in rows]
    assert all(sizes[a] >= sizes[b] for a, b in pairwise(order))  # longest first
    for micro in micros:
        members = micro.rows.tolist()
        assert len(members) == 1 or micro.input_ids.numel() <= budget
        assert micro.input_ids.shape == micro.position_ids.shape
        assert micro.input_ids.shape[0] == (1 if packing else len(members))
        assert micro.lengths.tolist() == [len(completions[i]) for i in members]
        assert micro.targets.tolist() == [t for i in members for t in completions[i]]
        assert (micro.tree is not None) == packing
        assert micro.attention_mask is None

        ids, positions = micro.input_ids.flatten(), micro.position_ids.flatten()
        predictors, used = micro.predictors.tolist(), 0
        for span, i in zip(spans(micro, [sizes[i] for i in members], packing), members):
            whole = prompts[i] + completions[i]
            assert ids[span].tolist() == whole
            assert positions[span].tolist() == list(range(len(whole)))
            if micro.tree is not None:
                assert (
                    micro.tree.sees(torch.tensor([span.stop - 1])).nonzero()[:, 1].tolist() == [*range(len(ids))][span]
                )
            for t, token in enumerate(completions[i]):
                where = predictors[used + t]
                assert where == span.start + len(prompts[i]) - 1 + t  # the state before the token
                assert ids[where + 1] == token
            used += len(completions[i])
        assert used == len(predictors)


@settings(max_examples=60, deadline=None)
@given(sequences.filter(bool), st.integers(1, 60), st.booleans())
def test_micro_batches_are_full(rows: list[tuple[list[int], list[int]]], budget: int, packing: bool) -> None:
    """The first sequence of a micro-batch would not have fitted into the one before."""
    micros = micro_batches([p for p, _ in rows], [c for _, c in rows], budget=budget, packing=packing)
    for before, after in pairwise(micros):
        first = len(rows[int(after.rows[0])][0]) + len(rows[int(after.rows[0])][1])
        longest = before.input_ids.shape[1]
        assert (before.input_ids.numel() + first if packing else (len(before.rows) + 1) * longest) > budget


def test_by_hand() -> None:
    prompts, completions = [[1, 2], [3]], [[4], [5, 6, 7]]
    (padded,) = micro_batches(prompts, completions, budget=8, packing=False)
    assert padded.rows.tolist() == [1, 0]
    assert padded.input_ids.tolist() == [[3, 5, 6, 7], [1, 2, 4, 0]]
    assert padded.predictors.tolist() == [0, 1, 2, 5]
    assert padded.targets.tolist() == [5, 6, 7, 4]
    (packed,) = micro_batches(prompts, completions, budget=7, packing=True)
    assert packed.input_ids.tolist() == [[3, 5, 6, 7, 1, 2, 4]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert packed.predictors.tolist() == [0, 1, 2, 5]
    assert len(micro_batches(prompts, completions, budget=7, packing=False)) == 2  # padding costs
    assert len(micro_batches(prompts, completions, budget=6, packing=True)) == 2


ROWS = st.lists(
    st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=4), st.lists(st.integers(3, 9), max_size=4)),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(ROWS, st.integers(1, 40))
def test_shared_prompts(rows: list[tuple[list[int], list[int]]], budget: int) -> None:
    """Each token sees exactly the tokens before it in its own sequence, at their own positions."""
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    micros = shared_prompt_batches(prompts, completions, budget=budget)
    assert sorted(i for micro in micros for i in micro.rows.tolist()) == list(range(len(rows)))
    for micro in micros:
        ids = micro.input_ids[0]
        assert micro.tree is not None
        sees = micro.tree.sees(torch.arange(len(ids)))  # (s, s)
        assert len(micro.rows) == 1 or ids.numel() <= budget
        at = 0
        for row, length in zip(micro.rows.tolist(), micro.lengths.tolist()):
            sequence = [*prompts[row], *completions[row]]
            assert micro.targets[at : at + length].tolist() == completions[row]
            for t in range(length):
                seen = sees[micro.predictors[at + t]].nonzero()[:, 0]
                before = len(prompts[row]) + t
                assert ids[seen].tolist() == sequence[:before]
                assert micro.position_ids[0, seen].tolist() == list(range(before))
            at += length


def test_shared_prompts_stand_once() -> None:
    """By hand: 1 2 begins both prompts; the last token of a completion is not needed."""
    (micro,) = shared_prompt_batches([[1, 2, 3], [1, 2, 4], [1, 2, 3]], [[5, 6], [7], [8, 9]], budget=100)
    assert micro.rows.tolist() == [0, 2, 1]
    assert micro.input_ids.tolist() == [[1, 2, 3, 4, 5, 8]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 2, 3, 3]]
    assert micro.targets.tolist() == [5, 6, 8, 9, 7]
    assert micro.predictors.tolist() == [2, 4, 2, 5, 3]


@pytest.mark.parametrize("packing", [False, True])
def test_no_rows(packing: bool) -> None:
    assert micro_batches([], [], budget=10, packing=packing) == []


def test_filler_holds_nothing_to_learn() -> None:
    micro = filler().to(torch.device("cpu"))
    assert micro.input_ids.numel() == 1
    assert len(micro.rows) == len(micro.lengths) == len(micro.targets) == len(micro.predictors) == 0
    assert micro.predictors.dtype == micro.targets.dtype == torch.long  # they index


def test_a_row_without_tokens_changes_no_token() -> None:
    (micro,) = micro_batches([[5, 6]], [[7, 8, 9]], budget=10, packing=False)
    more = micro.with_empty(torch.tensor([4, 2]))
    assert more.rows.tolist() == [0, 4, 2]
    assert more.lengths.tolist() == [3, 0, 0]
    assert torch.equal(more.predictors, micro.predictors)
    assert pad(more.targets, more.lengths).tolist() == [[7, 8, 9], [0, 0, 0], [0, 0, 0]]


# --- shares of the ranks ------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 6))
def test_deal(loads: list[int], ranks: int) -> None:
    shares = deal(loads, ranks)
    assert sorted(item for share in shares for item in share) == list(range(len(loads)))
    assert all(share == sorted(share) for share in shares)
    heaviest = max(loads, default=0)
    assert all(sum(loads[item] for item in share) <= sum(loads) / ranks + heaviest for share in shares)
    assert deal(loads, ranks) == shares  # every rank works it out for itself


def test_deal_by_hand() -> None:
    assert deal([9, 1, 1, 7, 2], 2) == [[0, 1], [2, 3, 4]]
    assert deal([0, 0, 0], 2) == [[0, 2], [1]]  # what costs nothing is spread too


def batch() -> Rollouts:
    return Rollouts(
        problems=[Problem(str(q), f"q{q}", "a") for q in range(3)],
        prompts=[[1] * 10, [2] * 20, [3] * 30],
        completions=[
            Completion([row] * length, [-1.0] * length, "stop") for row, length in enumerate([1, 2, 3, 4, 5, 6])
        ],
        group_size=2,
        ids=torch.arange(6),
        rewards=torch.arange(6.0),
        correct=torch.arange(6) > 2,
        texts=list("abcdef"),
        advantages=-torch.arange(6.0),
        used=torch.tensor([True, True, True, False, False, False]),
        extra_tokens=5,
    )


def test_questions_that_parted_come_together_again() -> None:
    whole = batch()
    again = Rollouts.joined([whole.take(whole.rows_of(questions)) for questions in ([2], [], [0, 1])])
    sorted_again = again.take(again.rows_of([1, 2, 0]))
    for name, value in vars(whole).items():
        other = getattr(sorted_again, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        elif name not in ("extra_tokens", "prefix"):  # of a draw, not of a question
            assert value == other, name


def test_every_field_is_taken_with_its_row() -> None:
    """By all the fields that there are: a field without a word on whose it is would stay whole."""
    whole = batch()
    whole.token_advantages = torch.arange(12.0).reshape(6, 2)
    whole.judged = torch.arange(6) > 1
    whole.pending = list("uvwxyz")  # type: ignore[arg-type]
    whole.lineage = [((row, row + 1),) for row in range(6)]
    whole.update = list(range(len(whole.problems)))
    part = whole.take([5, 1])
    for each in fields(Rollouts):
        value = getattr(part, each.name)
        if each.name in ("group_size", "extra_tokens", "prefix", "dropped"):
            continue
        assert len(value) == 2, each.name
        assert str(value[0]) == str(getattr(whole, each.name)[5 if each.metadata["by"] == "rollout" else 2]), each.name
    assert part.group_size == 1
    assert whole.keep([5, 1]).extra_tokens == 5 + 1 + 3 + 4 + 5


def test_repeated_by_hand() -> None:
    """Each token that some rollout of the update has counts once, in the first that has it."""
    lineage = [((1, 4),), ((2, 5),), ((1, 2), (3, 4)), ((1, 3), (4, 6)), ((1, 2), (3, 3), (5, 5)), ((6, 3),)]
    rollouts = batch()
    lengths = [ends[-1][1] for ends in lineage]
    rollouts.completions = [Completion([0] * length, [-1.0] * length, "stop") for length in lengths]
    assert not rollouts.repeated().any()  # nothing branched
    rollouts.lineage = lineage

    def repeated(used: list[bool]) -> list[int]:
        rollouts.used = torch.tensor(used)
        mask = rollouts.repeated()
        assert mask.shape == (6, 6)
        assert not (mask.int().diff(dim=1) > 0).any()  # beginnings
        return mask.sum(1).tolist()

    assert repeated([True] * 6) == [0, 0, 2, 3, 3, 0]
    assert repeated([False, True, True, True, True, True]) == [0, 0, 0, 2, 3, 0]  # the parent is left out
    assert repeated([False, True, False, True, True, True]) == [0, 0, 0, 0, 2, 0]
    assert repeated([False] * 6) == [0] * 6


@given(st.data())
def test_repeated_against_loops(data: st.DataObject) -> None:
    """A tree of rollouts: who drew a token, and where it stands, is the token."""
    lineage: list[tuple[tuple[int, int], ...]] = []
    for who in range(6):
        begun: list[tuple[int, int]] = []
        if lineage and data.draw(st.booleans()):
            parent = data.draw(st.sampled_from(lineage))
            cut = data.draw(st.integers(0, parent[-1][1]))
            for drawer, end in parent:
                if (begun[-1][1] if begun else 0) < cut:
                    begun.append((drawer, min(end, cut)))
        start = begun[-1][1] if begun else 0
        lineage.append((*begun, (who, start + data.draw(st.integers(1, 4)))))
    rollouts = batch()
    rollouts.completions = [Completion([0] * each[-1][1], [0.0] * each[-1][1], "stop") for each in lineage]
    rollouts.lineage = lineage
    rollouts.used = torch.tensor(data.draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    seen: set[tuple[int, int]] = set()
    expected = torch.zeros_like(rollouts.logp_engine, dtype=torch.bool)
    for row, each in enumerate(lineage):
        starts = [0, *(end for _, end in each)]
        for start, (who, end) in zip(starts, each):
            for place in range(start, end):
                if rollouts.used[row]:
                    expected[row, place] = (who, place) in seen
                    seen.add((who, place))
    assert torch.equal(rollouts.repeated(), expected)


def test_loads() -> None:
    assert batch().loads(share_prompts=False) == [10 + 1 + 10 + 2, 20 + 3, 0]
    assert batch().loads(share_prompts=True) == [10 + 1 + 2, 20 + 3, 0]


def test_a_micro_batch_writes_where_it_reads() -> None:
    """(B, T) -> (N,) -> (B, T), of the rows that the micro-batch holds and their tokens alone."""
    completions = [[1, 2, 3], [4], [5, 6]]
    micro = micro_batches([[9]] * 3, completions, budget=100, packing=True)[0].with_empty(torch.tensor([3]))
    padded = torch.arange(20.0).reshape(4, 5)
    found = torch.full((4, 5), -1.0)
    micro.write(found, micro.ragged_of(padded))
    lengths = torch.tensor([3, 1, 2, 0])
    assert torch.equal(found, torch.where(token_grid(lengths, 5), padded, -1.0))
    mask = micro.ragged_of(padded) % 2 == 0  # (N,)
    found = torch.full((4, 5), -1.0)
    micro.write(found, micro.ragged_of(padded)[mask], mask)
    expected = torch.where(padded % 2 == 0, padded, 0.0)
    assert torch.equal(found, torch.where(token_grid(lengths, 5), expected, -1.0))
    assert torch.equal(micro.grid(micro.ragged_of(padded)[mask], mask)[0], expected[micro.rows[0], :3])
    assert micro.rows_of(padded).shape == (4, 3)
    filler().write(found, torch.empty(0))


def test_one_process_reads_a_recorded_batch_in_the_updates_of_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 read question 0 in the first update and 1 in the second, rank 1 question 2 in the first."""
    whole = batch()
    whole.prefix, whole.judged = 0.4, torch.arange(len(whole.completions)) % 3 > 0
    monkeypatch.setattr("aipo.distributed.world_size", lambda: 2)
    for rank, questions, updates in ((0, [1, 0], [1, 0]), (1, [2], [0])):
        monkeypatch.setattr("aipo.distributed.rank", lambda rank=rank: rank)
        share = whole.take(whole.rows_of(questions))
        share.update = updates
        mask = torch.ones_like(share.logp_engine, dtype=torch.bool)  # (B, T)
        write_batch(tmp_path / "replay", 1, share, SimpleNamespace(kappa=0.2, mask=mask))  # type: ignore[arg-type]
    shares = read_batch(tmp_path, 1)
    known = {problem.id: problem for problem in whole.problems}
    rebuilt, mask, *_ = rebuild(shares, known, updates=2)
    assert [problem.id for problem in rebuilt.problems] == ["0", "2", "1"]
    assert rebuilt.updates(2) == [0, 0, 1]
    assert torch.equal(mask.sum(dim=1), rebuilt.lengths)
    rows = whole.rows_of([0, 2, 1])
    for name in ("ids", "rewards", "correct", "judged", "logp_engine"):
        assert torch.equal(getattr(rebuilt, name), getattr(whole, name)[rows])
    assert rebuilt.prefix == 0.4
