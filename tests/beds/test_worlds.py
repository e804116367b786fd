"""The problems of the beds: answers, layouts and what decides them, against the rules written out again."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aipo.beds.__main__ import main
from aipo.beds.worlds import BOXES, DIGITS, TURNS, WORLDS, Example
from aipo.problems.datasets import load_problems
from aipo.verify import is_correct


def numbers(words: list[str]) -> list[int]:
    return [int(word) for word in words if word in DIGITS]


def answer_of(name: str, example: Example) -> int:
    """By reading the question alone."""
    terms = numbers(example.question)
    if name == "fork":
        *_, last = terms
        return (last + 2 * (sum(terms[2:-1]) % 4)) % 10
    return sum(terms[2:] if name == "copy" else terms) % 10


@given(st.sampled_from(sorted(WORLDS)), st.integers(0, 10**6), st.floats(0, 1), st.integers(0, 4), st.integers(1, 20))
def test_a_demonstration_without_noise_is_right_and_its_critical_tokens_are_results(
    name: str, seed: int, fixed: float, fillers: int, words: int
) -> None:
    knobs = replace(WORLDS[name].knobs, noise=0.0, fixed=fixed, fillers=fillers, words=words)
    example = WORLDS[name].draw(random.Random(seed), knobs)
    assert int(example.answer) == answer_of(name, example)
    assert example.demonstration[-1] == BOXES[int(example.answer)]
    assert is_correct(example.answer, " ".join(example.demonstration))
    known = set(knobs.vocabulary())
    assert known >= {*example.question, *example.demonstration}
    results = {i for i, word in enumerate(example.demonstration) if word in (*DIGITS, *BOXES, *TURNS)}
    turns = {i for i, word in enumerate(example.demonstration) if word in TURNS}
    assert set(example.critical) == (turns if name == "fork" else results)
    fixed_fillers = sum(word == "w0" for word in example.demonstration)
    stretches = (len(example.demonstration) - len(results)) // max(fillers, 1)
    assert fixed_fillers >= stretches * round(fixed * fillers)


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_noise_at_critical_tokens_is_what_makes_an_answer_wrong(name: str) -> None:
    """It is right if those are as without noise, of a fork only then (of sums, two errors may cancel each other)."""
    world, draw, answered, clean = WORLDS[name], random.Random(0), 0, 0
    for _ in range(4000):
        example = world.draw(draw, world.knobs)
        terms = numbers(example.question)
        if name == "fork":
            true = [TURNS[sum(terms[2:-1]) % 4]]
        else:
            terms = terms[2:] if name == "copy" else terms
            sums = [total % 10 for total in accumulate(terms)][name == "chain" :]
            copied = terms if name == "copy" else [None] * len(sums)
            true = [DIGITS[each] for pair in zip(copied, sums) for each in pair if each is not None]
            true[-1] = BOXES[sums[-1]]
        right = example.demonstration[-1] == BOXES[int(example.answer)]
        noiseless = [example.demonstration[place] for place in example.critical] == true
        assert right >= noiseless
        assert name != "fork" or right == noiseless
        answered, clean = answered + right, clean + noiseless
    assert clean > 100
    assert 0.2 < answered / 4000 < 0.45  # where a base policy has something to learn from


def test_results_of_a_chain_follow_from_the_one_before() -> None:
    world, draw = WORLDS["chain"], random.Random(1)
    knobs = replace(world.knobs, noise=0.0)
    example = world.draw(draw, knobs)
    terms, said = numbers(example.question), [example.demonstration[place] for place in example.critical]
    for i, word in enumerate(said, start=1):
        total = sum(terms[: i + 1]) % 10
        assert word == (BOXES if i == knobs.steps else DIGITS)[total]


def test_rows_are_problems(tmp_path: Path) -> None:
    import json

    example = WORLDS["copy"].draw(random.Random(2), WORLDS["copy"].knobs)
    (tmp_path / "a.jsonl").write_text(json.dumps(example.row()) + "\n")
    (problem,) = load_problems(str(tmp_path / "a.jsonl"), split="train").problems
    assert problem.critical == tuple(example.critical)
    assert problem.answer == example.answer


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--noise=2", "--noise: 2.0 is no share"),
        ("--words=0", "--words: 0 is below 1"),
        ("--width=12", "--width: 12 is no"),
        ("--pretrain-steps=0", "--pretrain-steps: 0 is below 1"),
        ("--batch=0", "--batch: 0 is below 1"),
    ],
)
def test_bad_knobs(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chain", option]) == 2
    assert said in capsys.readouterr().err
