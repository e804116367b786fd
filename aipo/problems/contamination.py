"""Evaluation questions that also stand among the training questions, found by n-gram overlap."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from aipo.problems.datasets import Problem, stem

NGRAM = 8
SHARE = 0.5

# commands that only lay a formula out; copies of a question differ in them
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|q?quad|[clv]?dots[cbm]?)(?![a-zA-Z])")
# Chinese and Japanese put no spaces between words, so each of their characters counts as one
_HAN = r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = r"\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_WORD = re.compile(rf"[^\W_{_HAN}{_KANA}]+|[^\W_]")


@dataclass(frozen=True)
class Overlap:
    """``share`` of the n-grams of ``evaluation`` stand in the one question ``training``."""

    training: Problem
    evaluation: Problem
    share: float

    @property
    def same_answer(self) -> bool:
        """As text: a question that was rewritten to have an integer answer counts as another one."""
        return self.training.answer == self.evaluation.answer


def words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers of any script, without LaTeX layout, operators and punctuation."""
    return tuple(_WORD.findall(_LAYOUT.sub(" ", text).lower()))


def find_overlaps(training: Sequence[Problem], evaluation: Sequence[Problem]) -> list[Overlap]:
    """All pairs where at least half of the evaluation question's distinct 8-grams occur in the training question.

    An evaluation question of fewer than 8 words overlaps the training questions that have the very same words.
    Options of choice questions are not compared. The pairs are in the order of ``evaluation``, then of ``training``.
    """
    grams = [_grams(words(stem(problem))) for problem in evaluation]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for e, grams_of_one in enumerate(grams):
        for gram in grams_of_one:
            holders[gram].append(e)

    found: list[tuple[int, Overlap]] = []
    for problem in training:
        text = words(stem(problem))
        # a short text is a key as a whole; as such it matches only itself, for all n-grams have n words
        common = Counter(e for gram in _grams(text) for e in holders.get(gram, ()))
        found += [
            (e, Overlap(problem, evaluation[e], count / len(grams[e])))
            for e, count in common.items()
            if count >= SHARE * len(grams[e])
        ]
    return [overlap for _, overlap in sorted(found, key=lambda pair: pair[0])]


def _grams(text: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Distinct n-grams; the whole text, unless it is empty, where it is shorter than one."""
    if len(text) < NGRAM:
        return {text} if text else set()
    return {text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)}
