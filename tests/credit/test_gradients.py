"""Which tokens a signal keeps."""

from __future__ import annotations

import torch

from aipo.credit.gradients import top


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
