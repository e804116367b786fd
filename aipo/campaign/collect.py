"""What came of a campaign, tidy: a table with a row for each cell, one with a row for each of its steps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pandas as pd

from aipo.campaign.cells import Cell, Plan, differences
from aipo.campaign.schema import Read
from aipo.evaluation.results import average, load_results
from aipo.metrics import best_point, cost_share, trained_share, training_efficiency
from aipo.record.jsonl import read_jsonl

SHARES = re.compile(r"accuracy|correct|otf|share|truncated|no_answer")  # metrics in [0, 1], shown in percent


def collect(plan: Plan) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row a cell, a row a cell and step). What is not there yet has ``state`` and no figures.

    A condition that is read before training has no steps: the run it shares is another condition's.
    """
    own, backbone = differences(plan), _backbone(plan)
    runs, curves = [], []
    for cell in plan.cells:
        setting = cell.setting
        named = {"panel": setting.panel, "condition": setting.condition, "seed": setting.seed}
        row: dict[str, Any] = named | {"state": plan.state(cell), "key": cell.key, "folder": str(cell.folder)}
        row["differs"] = json.dumps(own[cell.key])
        trained = (cell.folder / "summary.json").is_file()
        if trained:
            log = read_jsonl(cell.folder / "metrics.jsonl")
            row |= figures(cell, log, [name for name in plan.campaign.columns if "/" in name], plan.campaign.metric)
            if setting.read != "first":
                tokens = accumulate(line.get("rollout/tokens") or 0.0 for line in log)
                curves += [{**named, **line, "tokens": so_far} for line, so_far in zip(log, tokens)]
        if cell.results is not None:  # the benchmarks are what such a cell is compared by, never its held-out questions
            row |= dict.fromkeys(("accuracy", "before", "mag", "tes"))
            if cell.results.is_file():
                row |= evaluated(cell, backbone.get(cell.backbone), row.get("otf"))
        runs.append(row)
    return pd.DataFrame(runs), pd.DataFrame(curves)


def save(plan: Plan, runs: pd.DataFrame, curves: pd.DataFrame) -> None:
    """Both as Parquet and CSV in the campaign's folder."""
    for name, table in (("runs", runs), ("curves", curves)):
        table.to_parquet(plan.folder / f"{name}.parquet", index=False)
        table.to_csv(plan.folder / f"{name}.csv", index=False)


def figures(cell: Cell, log: Sequence[dict[str, Any]], more: Sequence[str], metric: str) -> dict[str, Any]:
    """What the metrics of a finished run say. Shares and accuracies in percent, MAG in points."""
    read = cell.setting.read
    summary = json.loads((cell.folder / "summary.json").read_text())
    steps = [line for line in log if line["step"] > 0]
    seconds = [sum(v for k, v in line.items() if k.startswith("time/") and v is not None) for line in steps]
    otf, cost = trained_share(log), cost_share(log)
    before, value = at(log, metric, "first"), at(log, metric, read)
    mag = None if before is None or value is None else value - before
    cell_json = cell.folder / "cell.json"
    best = best_point(_points(log, metric))
    found: dict[str, Any] = {"accuracy": value, "before": before, "mag": mag, "best_step": best and best[0]}
    if read != "first":  # else nothing of the training is meant
        found |= {
            "otf": None if otf is None else 100 * otf,
            "cost_share": None if cost is None else 100 * cost,
            "steps": len(steps),
            "tokens": sum(line.get("rollout/tokens") or 0 for line in steps),
            "length": summary["length"],
            "seconds": sorted(seconds)[len(seconds) // 2] if seconds else None,
            "minutes": json.loads(cell_json.read_text())["seconds"] / 60 if cell_json.is_file() else None,
            "memory": max(summary["peak_memory_bytes"].values()) / 2**30,
        }
        found["tes"] = training_efficiency(mag, found["otf"]) if found["otf"] and mag is not None else None
    return found | {name: at(log, name, read) for name in more}


def at(log: Sequence[dict[str, Any]], metric: str, read: Read | int) -> float | None:
    """The metric where it is meant to be read, of a share in percent; None where it was not measured."""
    points = _points(log, metric)
    if isinstance(read, int):
        points = [point for point in points if point[0] == read]
    best = best_point(points)
    if best is None:
        return None
    _, value = {"first": points[0], "best": best}.get(str(read), points[-1])
    return 100 * value if SHARES.search(metric) else value


def _points(log: Sequence[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    return [(line["step"], line[metric]) for line in log if line.get(metric) is not None]


def evaluated(cell: Cell, before: float | None, otf: float | None) -> dict[str, Any]:
    """avg@k of each benchmark and their mean in percent; MAG over the model before training, if it was evaluated."""
    assert cell.results is not None
    results = load_results(cell.results).results
    accuracy = 100 * average(results)
    mag = None if before is None else accuracy - before
    found: dict[str, Any] = {name: 100 * result.accuracy for name, result in results.items()}
    found |= {"accuracy": accuracy, "before": before, "mag": mag}
    return found | {"tes": training_efficiency(mag, otf) if mag is not None and otf else None}


def _backbone(plan: Plan) -> dict[str, float]:
    """Accuracy before training by ``Cell.backbone``, where a condition asks for it."""
    return {
        cell.backbone: 100 * average(load_results(cell.results).results)
        for cell in plan.cells
        if cell.setting.read == "first" and cell.setting.intervene == "none" and cell.results and cell.results.is_file()
    }


def values_of(runs: pd.DataFrame, panel: str, column: str) -> dict[str, dict[int, float]]:
    """condition -> seed -> figure, of a panel; those that are there."""
    found: dict[str, dict[int, float]] = {}
    if column not in runs:
        return found
    for row in runs[runs["panel"] == panel].to_dict("records"):
        if row[column] is not None and not math.isnan(row[column]):
            found.setdefault(row["condition"], {})[row["seed"]] = float(row[column])
    return found
