"""Curves of a run, drawn from its ``metrics.jsonl`` alone, and bars of evaluations."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window system, no global state


class Panel(NamedTuple):
    """A title, the metrics drawn as lines, and two metrics with a band between them."""

    title: str
    lines: tuple[str, ...]
    band: tuple[str, ...] = ()


PANELS = (
    Panel("reward", ("reward/mean",)),
    Panel("held-out accuracy", ("validation/accuracy",), ("validation/accuracy_low", "validation/accuracy_high")),
    Panel("share of tokens trained on (OTF), of all generated", ("mask/otf", "mask/cost_share")),
    Panel("mask threshold κ", ("mask/kappa",)),
    Panel("mutual information, mean", ("mi/mean",)),
    Panel("mutual information, skew", ("mi/skew",)),
    Panel("completion length, tokens", ("rollout/length_mean",)),
    Panel("KL to the reference", ("loss/kl",)),
    Panel("policy entropy, nats", ("policy/entropy",)),
    Panel("clip fraction", ("loss/clip_fraction",)),
    Panel("KL between engine and trainer", ("mismatch/kl",)),
    Panel("importance weight", ("mismatch/weight_mean", "mismatch/weight_max")),
)
Series = dict[str, tuple[list[int], list[float]]]  # metric -> steps, values


def draw_curves(metrics: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draw every panel of which there are numbers on one sheet, a PNG at ``path``; False if there are none.

    ``metrics`` are lines of ``metrics.jsonl``: dicts with ``step``; a missing or null value is a step without a point.
    """
    series: Series = {key: ([], []) for panel in PANELS for key in panel.lines + panel.band}
    for line in metrics:
        for key, (steps, values) in series.items():
            if (value := line.get(key)) is not None:
                steps.append(line["step"])
                values.append(value)
    panels = [panel for panel in PANELS if any(series[key][0] for key in panel.lines)]
    if not panels:
        return False
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    sheet = Figure(figsize=(4 * columns, 2.8 * rows))
    axes = sheet.subplots(rows, columns, squeeze=False).flatten()
    for ax, panel in zip(axes, panels):
        _draw(ax, panel, series)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    # Inches, not the automatic layouts, which take longer than the drawing.
    width, height = sheet.get_size_inches()
    sheet.subplots_adjust(0.5 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.35 / height, wspace=0.25, hspace=0.45)
    _save(sheet, path)
    return True


@contextmanager
def young_garbage() -> Iterator[None]:
    """What was made within and refers to itself in circles, as a figure does, is freed at the end.

    While it is young that is cheap. Else it is found when Python looks through all objects, which it does the less
    often the more there are: beside a model four or five figures lie about, 8 MB each.
    """
    enabled = gc.isenabled()
    gc.disable()  # or what is made grows old
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect(0)


class Bar(Protocol):
    """Accuracy in [0, 1] with its interval."""

    @property
    def accuracy(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def draw_bars(variants: Mapping[str, Mapping[str, Bar]], path: Path) -> None:
    """A group of bars for each benchmark, one bar for each variant, with 95 % intervals; a PNG at ``path``."""
    benchmarks = list(next(iter(variants.values())))
    sheet = Figure(figsize=(2.0 + 1.2 * len(benchmarks), 3.2))
    ax = sheet.subplots()
    width = 0.8 / len(variants)
    for i, (variant, bars) in enumerate(variants.items()):
        shown = [bars[name] for name in benchmarks]
        places = [x + (i - (len(variants) - 1) / 2) * width for x in range(len(benchmarks))]
        reach = [
            [100 * max(bar.accuracy - bar.low, 0) for bar in shown],
            [100 * max(bar.high - bar.accuracy, 0) for bar in shown],
        ]
        ax.bar(places, [100 * bar.accuracy for bar in shown], width, yerr=reach, capsize=2, label=variant)
    ax.set_xticks(range(len(benchmarks)), benchmarks, fontsize="small")
    ax.set_ylabel("accuracy, %", fontsize="small")
    ax.tick_params(labelsize="small")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize="small", frameon=False, ncols=len(variants), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(sheet, path, tight=True)


def _save(sheet: Figure, path: Path, *, tight: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(".tmp-" + path.name)
    sheet.savefig(temporary, format="png", dpi=100, bbox_inches="tight" if tight else None)
    os.replace(temporary, path)  # whoever looks never sees half a picture


def _draw(ax: Axes, panel: Panel, series: Series) -> None:
    for key in panel.lines:
        steps, values = series[key]
        # A few points are marked: a single one would not show as a line.
        ax.plot(steps, values, label=key.split("/")[-1], linewidth=1.3, marker="." if len(steps) < 30 else "")
    if panel.band and series[panel.band[0]][0] == series[panel.band[1]][0]:
        (steps, low), (_, high) = (series[key] for key in panel.band)
        ax.fill_between(steps, low, high, alpha=0.2, linewidth=0)
    if len(panel.lines) > 1:
        ax.legend(fontsize="small", frameon=False, loc="upper left")
    ax.set_title(panel.title, fontsize="medium")
    ax.set_xlabel("step", fontsize="small")
    ax.tick_params(labelsize="small")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
