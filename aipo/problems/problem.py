"""What a question is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Problem:
    """One question and its gold answer; ``kind`` chooses the verifier's rules (``math`` or ``choice``).

    A choice question is asked as it stands: it ends with ``render_options(options)``, and the answer is a letter.
    ``options`` repeats them so that they can be put in another order; it may be left empty, as may ``solution``, a
    worked way to the answer (mi.gold_text: solution). ``origin`` names the source of the config it came by, where that
    is more than a path: suffix and reward may be its own. ``critical`` are the places, from 0, of the tokens of a
    completion that decide the answer, for problems made so that they are known (mask.score: critical and filler).
    """

    id: str
    question: str
    answer: str
    kind: str = "math"
    source: str = ""
    options: tuple[str, ...] = ()
    solution: str = ""
    origin: str = ""
    critical: tuple[int, ...] = ()

    @property
    def protected(self) -> bool:
        """Whether its text must not get into logs, tables and files, as GPQA's authors ask."""
        return "gpqa_diamond" in self.id.split("/")[:-1]  # sources of a mix put their names before it
