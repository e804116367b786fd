"""Problems whose completions have a known layout: which tokens decide the answer is known by construction.

Words are tokens. A completion is fillers, which say nothing, around the results of a computation; the last result
stands in a box. Demonstrations, from which the base policy is made, have wrong results with a known probability.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

DIGITS = [str(i) for i in range(10)]
BOXES = [rf"\boxed{{{i}}}" for i in range(10)]
SMALL = 4  # terms are below it: the result before one then already says something of the next, or nothing is learned
TURNS = ["north", "east", "south", "west"]


@dataclass(frozen=True)
class Knobs:
    """What can be turned on a bed.

    Entropies are in nats. That of a result is of about (noise, 10 outcomes): 1.2 at a noise of 0.3.
    """

    steps: int = field(metadata={"help": "results of a completion (digits to add up, for fork)"})
    fillers: int = field(metadata={"help": "fillers between two results"})
    words: int = field(metadata={"help": "words that a filler is drawn from, uniformly: its entropy is the logarithm"})
    fixed: float = field(metadata={"help": "share of the fillers that are always the same word: entropy 0"})
    noise: float = field(metadata={"help": "probability that a demonstration's result is drawn at random"})

    def vocabulary(self) -> list[str]:
        return [*DIGITS, *BOXES, *TURNS, ".", "=", *(f"w{i}" for i in range(self.words))]


@dataclass(frozen=True)
class Example:
    """A problem and one demonstration of it, in words; ``critical`` are places in a completion, from 0."""

    question: list[str]
    demonstration: list[str]
    answer: str
    critical: list[int]

    def row(self) -> dict[str, Any]:
        """As a line of a data file (:mod:`aipo.problems.datasets`)."""
        return {"question": " ".join(self.question), "answer": self.answer, "critical": self.critical}


def chain(draw: random.Random, knobs: Knobs) -> Example:
    """a + b + c ... modulo 10, one result a step: every result is decided by the one before it."""
    terms = [draw.randrange(10), *(draw.randrange(SMALL) for _ in range(knobs.steps))]
    text, said, true, critical = _Text(draw, knobs), terms[0], terms[0], []
    for i, term in enumerate(terms[1:], start=1):
        text.fill()
        true, said = (true + term) % 10, text.noisy((said + term) % 10, 10)
        critical.append(len(text.words))
        text.words.append(DIGITS[said] if i < knobs.steps else BOXES[said])
    return Example(_spaced(terms, knobs.fillers + 1), text.words, str(true), critical)


def fork(draw: random.Random, knobs: Knobs) -> Example:
    """The sum of some digits modulo 4 chooses a turn; the answer is the last digit, moved on by that turn.

    One token decides. What follows it, fillers and the answer, is decided by it. Two more digits distract.
    """
    terms, last = [draw.randrange(4), *(draw.randrange(2) for _ in range(knobs.steps - 1))], draw.randrange(10)
    distractors = [draw.randrange(10) for _ in range(2)]
    text, true = _Text(draw, knobs), sum(terms) % 4
    text.fill()
    said, place = text.noisy(true, 4), len(text.words)
    text.words.append(TURNS[said])
    text.fill()
    text.words.append(BOXES[(last + 2 * said) % 10])
    return Example(_spaced([*distractors, *terms, last], 1), text.words, str((last + 2 * true) % 10), [place])


def copy(draw: random.Random, knobs: Knobs) -> Example:
    """Copy each digit, say the sum modulo 10 so far: what decides is nearly certain, long stretches of drawn words are
    not. Two more digits, at the front, distract."""
    distractors = [DIGITS[draw.randrange(10)] for _ in range(2)]
    terms = [draw.randrange(SMALL) for _ in range(knobs.steps)]
    text, said, true, critical = _Text(draw, knobs), 0, 0, []
    for i, term in enumerate(terms, start=1):
        text.fill()
        copied = text.noisy(term, 10)
        true, said = (true + term) % 10, text.noisy((said + copied) % 10, 10)
        critical += [len(text.words), len(text.words) + 1]
        text.words += [DIGITS[copied], DIGITS[said] if i < knobs.steps else BOXES[said]]
    return Example([*distractors, *_spaced(terms, knobs.fillers + 2)], text.words, str(true), critical)


def _spaced(terms: list[int], stride: int) -> list[str]:
    """A question: the terms as far from each other as the results are, so that a term is as far from its result in
    every step. Rotary positions make that easy to learn, and the base policy takes a minute instead of an hour."""
    words = [word for term in terms for word in (DIGITS[term], *["."] * (stride - 1))]
    return [*words, "="]


@dataclass(frozen=True)
class World:
    draw: Callable[[random.Random, Knobs], Example]
    knobs: Knobs
    pretrain_steps: int  # to a base policy that is right in 20 to 40 %


WORLDS = {
    "chain": World(chain, Knobs(steps=4, fillers=3, words=16, fixed=0.0, noise=0.3), 600),
    "fork": World(fork, Knobs(steps=2, fillers=6, words=16, fixed=0.0, noise=0.9), 400),
    "copy": World(copy, Knobs(steps=3, fillers=8, words=16, fixed=0.0, noise=0.2), 600),
}


class _Text:
    """A demonstration as it is being written."""

    def __init__(self, draw: random.Random, knobs: Knobs) -> None:
        self.draw, self.knobs, self.words = draw, knobs, list[str]()

    def fill(self) -> None:
        """Fillers up to the next result; the fixed ones are the same places of every stretch."""
        n, fixed = self.knobs.fillers, round(self.knobs.fixed * self.knobs.fillers)
        drawn = {(i + 1) * n // max(n - fixed, 1) - 1 for i in range(n - fixed)}  # spread evenly
        self.words += [f"w{self.draw.randrange(self.knobs.words)}" if i in drawn else "w0" for i in range(n)]

    def noisy(self, result: int, outcomes: int) -> int:
        return self.draw.randrange(outcomes) if self.draw.random() < self.knobs.noise else result
