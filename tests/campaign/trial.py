"""A campaign to try things on, and run folders as its runs would leave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from aipo.campaign.cells import Cell, Plan, make_plan
from aipo.evaluation.results import Result, save_results

CAMPAIGN = """
title: A try
base: tiny.yaml
common: {model.path: MODEL, optim.steps: 4, validation.every: 2}
conditions:
  before: {mask.rule: all, read: first}
  all: {mask.rule: all}
  "random_3 & 10%": {mask.rule: random, mask.fraction: 0.1}
control: all
columns: [accuracy, mag, otf, tes, best_step, steps, reward/correct]
"""


EVALUATED = """
base: tiny.yaml
scale: paper
common: {model.path: MODEL}
panels: {small: {}, smaller: {optim.lr: 1e-5}}
conditions:
  Backbone: {read: first}
  trained: {}
  drop: {intervene: drop}
seeds: [4]
control: Backbone
evaluate: {benchmarks: [aime24, mine.jsonl], samples: 2}
columns: {aime24: AIME'24, mine: "", accuracy: Avg., mag: ""}
printed: {small: {trained: [42.0, null, 53.6, 12.1]}}
plots: [bars, forest]
"""


def planned(folder: Path, model: Path, text: str = CAMPAIGN, name: str = "mine") -> Plan:
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("MODEL", str(model)))
    return make_plan(path, folder / "runs")


def finish(folder: Path, accuracies: list[float], otf: float) -> None:
    """A run folder as train.py leaves it: validations at steps 0, 2 and 4."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(5):
        line: dict[str, Any] = {"step": step}
        if step % 2 == 0:
            line["validation/accuracy"] = accuracies[step // 2]
        if step:
            line |= {"mask/otf": otf, "rollout/used_tokens": 100 + step, "mask/cost_share": otf / 2}
            line |= {
                "rollout/tokens": 200 + step,
                "time/rollout_s": 1.0,
                "time/forward_s": 0.5,
                "reward/correct": step / 10,
            }
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"length": 9.0, "peak_memory_bytes": {"host": 2**30}}))


def evaluate(cell: Cell, share: float, *benchmarks: str) -> None:
    """What evaluate.py leaves of a cell that it has evaluated."""
    assert cell.results is not None
    result = Result(share, 0, 1, 2, 2, {"1": share, "2": 1}, share, 9, 0, 0, 0, 0, "f", {"a": [1, 0], "b": [1, 0]})
    cell.results.parent.mkdir(parents=True, exist_ok=True)
    save_results(cell.results.parent, {"model": "m", "settings": {}}, dict.fromkeys(benchmarks, result))


def runs(plan: Plan) -> dict[tuple[str, int], list[float]]:
    """Three validations for each condition and seed, written to the cells."""
    rng, made = np.random.default_rng(0), {}
    for cell in plan.cells:
        if not cell.folder.exists():
            values = [round(float(v), 3) for v in rng.uniform(0.2, 0.6, 3)]
            finish(cell.folder, values, 1.0 if cell.setting.condition != "random_3 & 10%" else 0.1)
            made[cell.folder.name, cell.setting.seed] = values
    return {(c.setting.condition, c.setting.seed): made[c.folder.name, c.setting.seed] for c in plan.cells}
