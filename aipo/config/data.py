"""Where questions come from: a set of them (a source), and what is said of it where it is trained on or watched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from aipo.config.base import Fraction, Positive, Section

VERIFIER = "verifier"
Function = Annotated[str, Field(pattern=r"^(verifier|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)$")]


class Columns(Section):
    """Dots lead into nested columns, numbers into lists: ``prompt.0.content``."""

    question: str = "question"
    """column of the question"""
    answer: str = "answer"
    """column of the gold answer"""
    id: str | None = "id"
    """field of an id; null, or where there is none: made from the question"""
    kind: str | None = "kind"
    """of math or choice"""
    source: str | None = "source"
    """of what a row says of its origin"""
    options: str | None = "options"
    """of the options of a choice"""
    solution: str | None = "solution"
    """of a worked solution"""


class SourceReward(Section):
    """null is as in the section reward."""

    function: Function | None = None
    """reward.function of its questions"""
    correctness: Fraction | None = None
    """reward.correctness of its questions"""
    format: Fraction | None = None
    """reward.format of its questions"""
    length: Fraction | None = None
    """reward.length of its questions"""


class Source(Section):
    path: str
    """JSONL or Parquet file, folder laid out as on the hub, hub:OWNER/NAME, or embedded:chain_sum"""
    name: str | None = None
    """in metrics and messages; null is the end of path"""
    subset: str | None = None
    """configuration of a hub set or folder that has several"""
    split: str = "train"
    """of a hub set or folder"""
    revision: str | None = None
    """commit, tag or branch of a hub set"""
    streaming: bool = False
    """read a hub set as it comes, without a copy on disk"""
    rows: Positive | None = None
    """only the first so many; null is all"""
    columns: Columns = Columns()
    """where the fields of a question stand"""
    kind: Literal["math", "choice"] = "math"
    """of rows that do not say it"""
    suffix: str | None = None
    """text appended to its questions; null is data.suffix"""
    reward: SourceReward = SourceReward()
    """keys of the section reward that differ for its questions"""

    @property
    def called(self) -> str:
        """Its name, or the end of its path without an ending."""
        return self.name or Path(self.path.partition(":")[2] or self.path).stem


class TrainSource(Source):
    weight: Annotated[float, Field(gt=0)] | None = None
    """its share of the questions drawn, relative to the others; null for all sources: by their numbers of questions"""


class WatchSource(Source):
    every: Positive | None = None
    """steps between its measurements; null is validation.watch_every"""
    samples: Positive | None = None
    """a question; null is validation.watch_samples"""


def _shape(value: Any) -> str:
    return "path" if isinstance(value, str) else "source"


# a path alone, or all of a source; discriminated, so that an error speaks of the one that was meant
PathOrSource = Annotated[Annotated[str, Tag("path")] | Annotated[Source, Tag("source")], Discriminator(_shape)]
PathOrMix = Annotated[
    Annotated[str, Tag("path")] | Annotated[tuple[TrainSource, ...], Tag("sources")],
    Discriminator(lambda value: "path" if isinstance(value, str) else "sources"),
]
PathOrWatched = Annotated[Annotated[str, Tag("path")] | Annotated[WatchSource, Tag("source")], Discriminator(_shape)]
