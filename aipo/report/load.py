"""What a run folder holds, old or new: whatever is missing is left out of the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aipo.errors import UserError
from aipo.record.checkpoints import flatten, step_of
from aipo.record.jsonl import read_jsonl

Row = dict[str, Any]  # of a table

FIXED = {
    "group", "sample", "group_size", "question_id", "bucket", "question", "prompt", "answer", "extracted", "completion",
    "reward", "correct", "advantage", "used", "reason", "finish_reason", "token_ids", "tokens",
}  # fmt: skip
"""columns of a recorded rollout; all others are figures, a value a token"""


@dataclass(frozen=True)
class Run:
    """A run folder, read but for its rollouts, which are many: :meth:`groups`."""

    folder: Path
    metrics: list[Row]  # one a step, the validation before training first
    config: dict[str, Any]  # dotted keys
    held_out: dict[int, list[Row]]  # step -> questions with what is right of each
    summary: dict[str, Any]
    versions: dict[str, str]
    git: dict[str, Any] | None
    commands: list[str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def steps(self) -> list[Row]:
        """Lines of steps that trained."""
        return [line for line in self.metrics if line["step"] > 0]

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) wherever there is one."""
        return [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]

    def recorded(self) -> dict[int, Path]:
        """Step -> the file with its rollouts."""
        return {step_of(path): path for path in sorted((self.folder / "rollouts").glob("step-*.parquet"))}

    def groups(self, step: int) -> Iterator[list[Row]]:
        """The recorded rollouts of a step, a list a group."""
        rows = read_rollouts(self.recorded()[step])
        for group in dict.fromkeys(row["group"] for row in rows):
            yield [row for row in rows if row["group"] == group]


def read_rollouts(path: Path) -> list[Row]:
    """Raises UserError for a file that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged ({error}): delete it") from None


def is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file()


def load_run(folder: Path) -> Run:
    """Raises UserError where there is no run, or a damaged file."""
    if not is_run(folder):
        raise UserError(f"{folder} is no run folder: it has no metrics.jsonl")
    metrics = read_jsonl(folder / "metrics.jsonl")
    if not metrics:
        raise UserError(f"{folder}: metrics.jsonl has no line yet: there is nothing to report")

    def parsed(name: str) -> Any:
        path = folder / name
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error})") from None

    config, commands = folder / "config.yaml", folder / "command.txt"
    return Run(
        folder=folder,
        metrics=metrics,
        config=flatten(yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config.is_file() else {},
        held_out={line["step"]: line["questions"] for line in read_jsonl(folder / "held_out.jsonl")},
        summary=parsed("summary.json") or {},
        versions=parsed("versions.json") or {},
        git=parsed("git.json"),
        commands=commands.read_text(encoding="utf-8").splitlines() if commands.is_file() else [],
    )
