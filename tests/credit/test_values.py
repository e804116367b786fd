"""Values of prefixes and their changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from aipo.credit.values import Valued, by_chance, changes, cuts_of, enough_continuations, value_prefixes
from aipo.errors import UserError
from aipo.problems.problem import Problem
from aipo.record.jsonl import plain
from aipo.rollout.base import Completion, Request, Sampling
from aipo.rollout.collect import Collector

PROMPT = [90, 91]
VERDICTS = {"+": 1.0, "-": 0.0, "?": float("nan")}


def test_cuts_end_with_the_whole_completion() -> None:
    assert cuts_of(5, 1) == [0, 1, 2, 3, 4, 5]
    assert cuts_of(5, 2) == [0, 2, 4, 5]
    assert cuts_of(4, 2) == [0, 2, 4]


class Scripted:
    """Engine, prompter and verifier in one: how the continuations of each prefix end, and what is said of that."""

    def __init__(self, ends: dict[tuple[int, ...], str]) -> None:
        self.ends, self.asked, self.seeds = ends, Counter[tuple[int, ...]](), set[int]()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, on_done: Callable[[int, Completion], None]
    ) -> list[Completion]:
        done = []
        for i, request in enumerate(requests):
            assert list(request.prompt_ids[:2]) == PROMPT
            prefix = tuple(request.prompt_ids[2:])
            assert request.max_tokens == sampling.max_tokens - len(prefix)
            done.append(Completion([ord(self.ends[prefix][self.asked[prefix]])], [0.0], "stop"))
            self.asked[prefix] += 1
            self.seeds.add(request.seed)
            on_done(i, done[-1])
        return done

    def decode(self, tokens: Sequence[int]) -> str:
        return chr(tokens[-1])

    def submit(self, problem: Problem, text: str, length: int, sample: int) -> str:
        return text

    def collect(self, pending: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        rewards = torch.tensor([VERDICTS[end] for end in pending])
        return rewards, rewards == 1, {}


def test_a_value_is_the_share_of_right_continuations() -> None:
    """Of those with a verdict; a prefix that rollouts have in common is asked for once."""
    said = [[1, 2, 3], [1, 2, 4, 5], [7, 8, 9, 10, 11]]
    ends = {(): "-+--", (1, 2): "++-+", (7, 8): "----", (7, 8, 9, 10): "+?+-"}
    nan = float("nan")
    drawn = Valued("q", [Completion(ids, [-0.5] * len(ids), "stop") for ids in said], [1.0, 0.0, nan], ["", "", ""])
    script: Any = Scripted(ends)
    collector, rollouts = Collector(script, script, script, seed=0), drawn.rollouts(Problem("q", "?", "1"), PROMPT)
    found = value_prefixes(collector, rollouts, Sampling(max_tokens=16), continuations=4, stride=2)
    assert found.cuts == [[0, 2, 3], [0, 2, 4], [0, 2, 4, 5]]
    assert found.values[:2] == [[1 / 4, 3 / 4, 1.0], [1 / 4, 3 / 4, 0.0]]
    assert found.values[2] == pytest.approx([1 / 4, 0, 2 / 3, nan], nan_ok=True)
    assert script.asked == dict.fromkeys(ends, 4)
    assert len(script.seeds) == 16


def test_the_standard_error_is_that_of_simulated_values() -> None:
    draw, count = np.random.default_rng(0), 64
    before, after = draw.binomial(count, 0.5, 4000) / count, draw.binomial(count, 0.8, 4000) / count
    found = [changes(torch.tensor([a, b, 1.0]), count) for a, b in zip(before, after)]
    spread = np.std([float(delta[0]) for delta, _ in found])
    assert np.mean([float(error[0]) for _, error in found]) == pytest.approx(spread, rel=0.05)
    delta, error = found[0]
    assert float(delta[1]) == pytest.approx(1 - after[0])
    assert float(error[1]) < float(error[0])  # the reward itself is exact


@pytest.mark.parametrize("value", [0.02, 0.3, 0.5])
def test_changes_by_chance_are_as_many_as_simulated(value: float) -> None:
    draw, count = np.random.default_rng(0), 16
    pairs, times = np.unique(draw.binomial(count, value, (20_000, 2)), axis=0, return_counts=True)  # V does not change
    found = [changes(torch.tensor([*pair, 1.0]), count) for pair in (pairs / count).tolist()]
    seen = np.average([bool(delta[0].abs() > 2 * error[0]) for delta, error in found], weights=times)
    said = by_chance(torch.tensor([value, value, 1.0]), count)
    assert float(said[0]) == pytest.approx(seen, rel=0.15, abs=0.002)
    assert float(said[1]) == 0.0  # the end has no noise
    assert by_chance(torch.tensor([float("nan"), value, 1.0]), count)[0].isnan()


def test_equal_outcomes_are_not_certainty() -> None:
    _, error = changes(torch.tensor([0.0, 0.0, 0.0]), 8)
    assert (error > 0).all()


def test_too_few_continuations_are_refused() -> None:
    enough_continuations(8)
    with pytest.raises(UserError, match="--continuations: with 1 of them"):
        enough_continuations(1)


def test_a_row_comes_back() -> None:
    import json

    valued = Valued(
        "q", [Completion([1, 2], [-0.5, -1.0], "stop")], [1.0], ["a b"], [[0, 1, 2]], [[0.5, float("nan"), 1]]
    )
    again = Valued.of(json.loads(json.dumps(plain(valued.row()))))
    assert again.completions == valued.completions
    assert again.cuts == valued.cuts
    assert np.isnan(again.values[0][1])
