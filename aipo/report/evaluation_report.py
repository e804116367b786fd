"""The page of one evaluation, or of two compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aipo.errors import UserError
from aipo.evaluation.results import (
    Evaluation,
    compare,
    comparison_rows,
    load_results,
    paired_scores,
    result_rows,
    settings_differ,
)
from aipo.record.jsonl import read_jsonl
from aipo.report.load import Row
from aipo.report.page import default_place, write_page

UNREAD = 60  # answers of a benchmark that are shown
ENDING = 400  # characters of a completion: its end, where an answer would be
MARKS = {"correct": "r", "wrong": "", "no_answer": "n"}  # verdict -> class; all others are no verdict


@dataclass(frozen=True)
class Shown(Evaluation):
    """A folder of evaluate.py: its numbers, and its completions by benchmark."""

    name: str
    rows: dict[str, list[Row]]


def is_evaluation(folder: Path) -> bool:
    return (folder / "results.json").is_file()


def load_evaluation(folder: Path) -> Shown:
    """UserError where there is no evaluation, or a damaged one."""
    found = load_results(folder / "results.json")
    rows = {name: read_jsonl(folder / f"{name}.jsonl") for name in found.results}
    return Shown(**vars(found), name=f"{found.model} ({folder.resolve().name})", rows=rows)


def evaluation_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of the first folder, and of the second against it; returns its path, else of ``default_place``.

    UserError for more than two, or for two that have no problem in common.
    """
    if len(folders) > 2:
        raise UserError(f"a report compares two evaluations at most, got {len(folders)}")
    evaluations = [load_evaluation(folder) for folder in folders]
    both = evaluations if len(evaluations) == 2 else None
    return write_page(
        out or default_place(folders),
        "evaluation.html.j2",
        {},
        title=" against ".join(each.name for each in reversed(evaluations)),
        evaluations=[
            {
                "name": each.name,
                "table": result_rows(each.results),
                "benchmarks": [benchmark(each, name) for name in each.results],
            }
            for each in evaluations
        ],
        comparison=comparison_rows(compare(both[0].results, both[1].results)) if both else None,
        notes=settings_differ(both[0].settings, both[1].settings) if both else [],
        flips=flips(*both) if both else [],
    )


def benchmark(evaluation: Shown, name: str) -> Row:
    """The grid of a benchmark, hardest problems last, and what the verifier could not read."""
    result, rows = evaluation.results[name], evaluation.rows[name]
    samples: dict[str, list[Row]] = {}
    for row in rows:
        if row["id"] in result.correct and row["sample"] < result.samples:
            samples.setdefault(row["id"], []).append(row)
    grid = [
        {
            "id": key,
            "question": next((row["question"] for row in samples.get(key, []) if "question" in row), key),
            "share": sum(marks) / len(marks),
            "marks": [MARKS.get(row["verdict"], "v") for row in samples.get(key, [])]
            or ["r" if m else "" for m in marks],
        }
        for key, marks in result.correct.items()
    ]
    unread = [row for group in samples.values() for row in group if row["verdict"] not in ("correct", "wrong")]
    return {
        "name": name,
        "result": result,
        "grid": sorted(grid, key=lambda line: -line["share"]),
        "unread_total": len(unread),
        "unread": [
            {
                "id": row["id"],
                "sample": row["sample"],
                "verdict": row["verdict"].replace("_", " "),
                "answer": row["answer"],
                "gold": row["gold"],
                "finish": row["finish_reason"],
                "ending": row.get("completion", "")[-ENDING:],
            }
            for row in unread[:UNREAD]
        ],
    }


def flips(a: Shown, b: Shown) -> list[Row]:
    """By benchmark, the problems right in at least half of the samples in one evaluation only."""
    found = []
    for name in paired_scores(a.results, b.results):
        lines = {line["id"]: line for line in benchmark(a, name)["grid"]}
        pairs = [(lines[line["id"]], line) for line in benchmark(b, name)["grid"] if line["id"] in lines]
        gained = [pair for pair in pairs if pair[0]["share"] < 0.5 <= pair[1]["share"]]
        lost = [pair for pair in pairs if pair[1]["share"] < 0.5 <= pair[0]["share"]]
        found.append({"name": name, "problems": len(pairs), "gained": gained, "lost": lost})
    return found
