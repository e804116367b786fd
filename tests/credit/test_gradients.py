"""Which tokens a signal keeps, and what their gradient is compared with."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aipo.credit import gradients
from aipo.credit.gradients import measure_batch, top
from aipo.problems.problem import Problem
from aipo.record.progress import Progress
from aipo.rollout.base import Completion
from aipo.rollouts import Rollouts


def test_the_highest_scores_of_each_completion() -> None:
    scores = torch.tensor(
        [[0.1, 0.9, 0.4, 0.3], [0.2, 0.1, torch.nan, torch.nan], [torch.nan, 0.5, torch.nan, 9.0]]
    )  # (3, 4)
    kept = top(scores, torch.tensor([4, 2, 3]), 0.5)
    assert kept.tolist() == [[False, True, True, False], [True, False, False, False], [False, True, False, False]]


def test_equal_scores_are_kept_wherever_they_stand() -> None:
    scores = torch.zeros(2000, 11)
    scores[:, 10] = 1.0
    kept = top(scores, torch.full((2000,), 11), 0.3)  # three: the last and two of ten
    assert (kept.sum(1) == 3).all()
    assert kept[:, 10].all()
    assert ((kept[:, :10].float().mean(0) - 0.2).abs() < 0.05).all()  # its standard deviation is 0.009


def test_the_cosine_at_equal_cost_lies_between_whole_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient is the sum of the selected token ids, of each question along an axis of its own; a token costs 1."""
    said = [[1], [1], [1, 2, 3], [1, 2, 3]]
    rollouts = Rollouts(
        problems=[Problem("a", "?", "1"), Problem("b", "?", "2")],
        prompts=[[5], [6]],
        completions=[Completion(ids, [0.0] * len(ids), "stop") for ids in said],
        group_size=2,
        ids=torch.arange(4),
    )

    def gradient(passes: Any, part: Rollouts, mask: Tensor) -> Tensor:
        found = torch.zeros(2)
        for row, ids in enumerate(part.each_completion):
            axis = "ab".index(part.question_of(row).id)
            found[axis] += sum(token for token, chosen in zip(ids, mask[row].tolist()) if chosen)
        return found

    def cosine(a: float, b: float) -> float:
        """With (3, 4)."""
        return (3 * a + 4 * b) / (5 * math.hypot(a, b))

    early = -torch.arange(3.0).expand(4, 3)
    monkeypatch.setattr(gradients, "gradient", gradient)
    monkeypatch.setattr(gradients, "sizes", lambda model: {})
    monkeypatch.setattr(gradients, "cost", lambda model, part, mask: float(mask.sum()))
    monkeypatch.setattr(gradients, "all_signals", lambda *_: {"early": lambda: early})
    passes: Any = SimpleNamespace(sharded=SimpleNamespace(policy=SimpleNamespace(model=None)))
    with Progress() as progress:
        measured = measure_batch(
            passes, [], rollouts, torch.tensor([3.0, 4.0]), [0.5], progress, wanted=[], name="batch"
        )
    one, both = cosine(2, 0), cosine(2, 12)
    same = one + (6 / 8 - 2 / 8) / (1 - 2 / 8) * (both - one)  # of 8 tokens the first question has 2, a signal keeps 6
    expected = [("all tokens", 1.0, both, both), ("early", 0.75, cosine(2, 6), same)]
    expected += [("early, lowest", 0.75, cosine(2, 10), same)]
    for row, (signal, cost, own, rival) in zip(measured, expected, strict=True):
        assert (row["signal"], row["cost"]) == (signal, cost)
        assert row["cosine"] == pytest.approx(own)
        assert row["same_cost"] == pytest.approx(rival)
