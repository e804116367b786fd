"""Validation questions from the training set: what is reported steers nothing, so no benchmark may do their work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from aipo.errors import UserError
from aipo.problems.contamination import find_overlaps
from aipo.problems.problem import Problem


def hold_out(problems: Sequence[Problem], count: int, *, seed: int) -> tuple[list[Problem], list[Problem], int]:
    """Questions to train on, ``count`` questions held out, and how many others left the training as their copies.

    Which are held out depends on ``seed`` and the text of each question alone: not on their order, nor on which others
    there are. A copy has at least half of a held-out question's 8-grams (:mod:`aipo.problems.contamination`).

    Raises:
        UserError: if nothing would be left to train on.
    """
    drawn = sorted(problems, key=lambda p: hashlib.sha256(f"{seed}/{p.question}".encode()).digest())
    held_out, rest = drawn[:count], {problem.id for problem in drawn[count:]}
    copies = {overlap.training.id for overlap in find_overlaps([p for p in problems if p.id in rest], held_out)}
    kept = [problem for problem in problems if problem.id in rest - copies]
    if not kept:
        raise UserError(
            f"validation.holdout: {count} questions and their {len(copies)} near-duplicates are all {len(problems)} of "
            "data.train: lower it, or name held-out questions in data.validation"
        )
    return kept, held_out, len(copies)
