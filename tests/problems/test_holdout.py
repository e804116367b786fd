from __future__ import annotations

import pytest

from aipo.errors import UserError
from aipo.problems.datasets import Problem
from aipo.problems.holdout import hold_out


def test_held_out_questions_and_their_copies_are_not_trained_on() -> None:
    distinct = [Problem(str(i), f"word{i}", "1") for i in range(40)]
    kept, held_out, copies = hold_out(distinct, 10, seed=0)
    assert (len(kept), len(held_out), copies) == (30, 10, 0)
    assert [p.id for p in kept] == [p.id for p in distinct if p not in held_out]  # in their order
    doubled = [*distinct, *(Problem(f"{p.id} again", f"{p.question}?", "1") for p in held_out)]
    found = hold_out(doubled, 10, seed=0)
    words = [{p.question.strip("?") for p in part} for part in found[:2]]
    assert not words[0] & words[1]
    assert found[2] == len(doubled) - len(found[0]) - 10 > 0


def test_which_are_held_out_is_a_matter_of_the_seed_alone() -> None:
    distinct = [Problem(str(i), f"word{i}", "1") for i in range(40)]
    first = hold_out(distinct, 10, seed=0)[1]
    assert hold_out(distinct[::-1], 10, seed=0)[1] == first
    assert hold_out(distinct, 10, seed=1)[1] != first
    without = [p for p in distinct if p != first[3]]
    assert hold_out(without, 9, seed=0)[1] == first[:3] + first[4:]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(UserError, match=r"validation\.holdout: 1 questions and their 39 near-duplicates are all 40"):
        hold_out([Problem(str(i), f"what is {'+-'[i % 2]} 2", "1") for i in range(40)], 1, seed=0)
