"""Metrics over steps, as the page's script draws them."""

from __future__ import annotations

from typing import Any

from aipo.record.plots import PANELS, Panel
from aipo.report.load import Run

POINTS = 1200  # of a curve; beyond, neighbours are averaged: a screen has no more

MORE = (
    Panel("reward and its parts", ("reward/correct", "reward/format", "reward/length")),
    Panel("rollouts in the update", ("rollout/used",)),
    Panel("cut off, without an answer, no verdict", ("rollout/truncated", "reward/no_answer", "reward/timed_out")),
    Panel("gradient norm", ("policy/grad_norm",)),
    Panel("learning rate", ("policy/lr",)),
    Panel("engine against trainer, nats", ("mismatch/gap",)),
    Panel("share of a bucket", ("curriculum/share_easy", "curriculum/share_medium", "curriculum/share_hard")),
    Panel(
        "questions in a bucket",
        ("curriculum/questions_easy", "curriculum/questions_medium", "curriculum/questions_hard"),
    ),
)
SHARES = ("accuracy", "OTF", "rollouts in the update", "cut off", "clip fraction", "share of")  # shown as percent


def panels(runs: list[Run]) -> list[dict[str, Any]]:
    """The panels of which any run has numbers, seconds by phase and watched sets among them."""
    keys = sorted({key for run in runs for line in run.metrics for key in line})
    phases = tuple(key for key in keys if key.startswith("time/") and key.endswith("_s"))
    watched = sorted(key for key in keys if key.startswith("watch/") and key.endswith("/accuracy"))
    every = [*PANELS, *MORE, Panel("seconds of a step by phase", phases)]
    every += [Panel(f"accuracy, {key.split('/')[1]}", (key,), (f"{key}_low", f"{key}_high")) for key in watched]
    found = []
    for panel in every:
        lines = [key for key in panel.lines if any(run.series(key) for run in runs)]
        if lines:
            percent = any(word in panel.title for word in SHARES)
            found.append({"title": panel.title, "lines": lines, "band": list(panel.band), "percent": percent})
    return found


def series(run: Run, shown: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Metric -> [steps, values]."""
    keys = dict.fromkeys(key for panel in shown for key in (*panel["lines"], *panel["band"]))
    return {key: thinned(points) for key in keys if (points := run.series(key))}


def thinned(points: list[tuple[int, float]]) -> list[list[float]]:
    width = -(-len(points) // POINTS)
    steps: list[float] = []
    values: list[float] = []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        steps.append(part[-1][0])
        values.append(float(f"{sum(value for _, value in part) / len(part):.5g}"))
    return [steps, values]
