"""The pictures of a campaign: learning curves with bands, differences from the control, bars, a map of cut-points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from aipo.campaign.cells import Plan
from aipo.campaign.collect import SHARES, values_of
from aipo.campaign.schema import Plot
from aipo.campaign.statistics import Comparison
from aipo.campaign.tables import Rows
from aipo.metrics import bootstrap_interval
from aipo.record.checkpoints import flatten

MANY = 7  # conditions above which each has a panel of its own, with the others in grey
Band = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x, mean, low, high: (n,) each


def draw(
    plan: Plan, rows: Rows, curves: pd.DataFrame, runs: pd.DataFrame, made: Mapping[str, Mapping[str, Comparison]]
) -> list[Path]:
    """A PNG for each plot of which there are figures."""
    written = []
    for number, plot in enumerate(plan.campaign.plots):
        sheet = None
        if plot.kind == "curves" and plot.metric in curves:
            sheet = _curves(plan, plot, curves)
        elif plot.kind == "forest" and any(made.values()):
            sheet = _forest(plan, made)
        elif plot.kind == "bars":
            sheet = _bars(plan, rows)
        elif plot.kind == "heatmap":
            sheet = _heatmap(plan, plot, runs)
        if sheet is not None:
            earlier = sum(each.kind == plot.kind for each in plan.campaign.plots[:number])
            path = plan.folder / f"{plot.kind}{f'-{earlier + 1}' if earlier else ''}.png"
            sheet.savefig(path, dpi=100, bbox_inches="tight")
            written.append(path)
    return written


def band(curves: pd.DataFrame, metric: str, x: str) -> Band:
    """x, mean, low, high over seeds, (n,) each; the band is the 95 % bootstrap interval.

    Seeds that generated different numbers of tokens are read off their lines at common places.
    """
    seeds = [part[[x, metric]].dropna().to_numpy(float) for _, part in curves.groupby("seed")]
    seeds = [points for points in seeds if len(points)]
    if not seeds:
        return (np.empty(0),) * 4
    end = min(points[-1, 0] for points in seeds)
    places = np.array(sorted({place for points in seeds for place in points[:, 0] if place <= end}))
    if x == "tokens":
        places = np.linspace(0, end, max(len(points) for points in seeds))
    lines = np.array([np.interp(places, points[:, 0], points[:, 1]) for points in seeds])  # (seeds, n)
    intervals = np.array([bootstrap_interval(list(column), 0, resamples=1000) for column in lines.T])  # (n, 2)
    return places, lines.mean(0), intervals[:, 0], intervals[:, 1]


def _curves(plan: Plan, plot: Plot, curves: pd.DataFrame) -> Figure:
    across, up = (1000 if plot.x == "tokens" else 1), (100 if SHARES.search(plot.metric) else 1)
    found = {}
    for place, part in curves.groupby(["panel", "condition"], sort=False):
        x, *values = band(part, plot.metric, plot.x)
        mean, low, high = (up * each for each in values)
        found[place] = x / across, mean, low, high
    panels = list(plan.campaign.panels) or [""]
    bands = {
        (panel, name): found[panel, name]
        for panel in panels
        for name in plan.campaign.variants()
        if (panel, name) in found
    }
    return draw_bands(
        bands,
        across="step" if plot.x == "step" else "thousand generated tokens",
        up=f"{plot.metric}{', %' if up == 100 else ''}; mean and 95 % over seeds",
    )


def draw_bands(bands: Mapping[tuple[str, str], Band], *, across: str, up: str) -> Figure:
    """Means with their bands by (panel, condition): a panel for all its conditions, or where they are many for each."""
    panels, names = (list(dict.fromkeys(part)) for part in zip(*bands))
    many = len(names) > MANY
    places = [(panel, name) for panel in panels for name in names] if many else [(panel, "") for panel in panels]
    small = len(places) > 3
    columns = min(len(places), 4)
    lines = -(-len(places) // columns)
    sheet = Figure(figsize=((3.2 if small else 5.0) * columns, (1.9 if small else 3.6) * lines))
    axes = sheet.subplots(lines, columns, squeeze=False, sharey=True).flatten()
    shown: dict[str, Line2D] = {}
    for ax, (panel, own) in zip(axes, places):
        for i, name in enumerate(names):
            if (panel, name) not in bands:
                continue
            x, mean, low, high = bands[panel, name]
            if not many or name == own:
                colour = colormaps["tab10"](i % 10)
                (shown[name],) = ax.plot(x, mean, color=colour, marker="." if len(x) < 30 else "", linewidth=1.5)
                ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            else:
                ax.plot(x, mean, color="0.85", linewidth=0.8, zorder=0)
        ax.set_title(": ".join(part for part in (panel, own) if part), fontsize="small")
        _quiet(ax)
    if not many:
        sheet.legend(shown.values(), shown.keys(), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for ax in axes[len(places) :]:
        ax.set_axis_off()
    sheet.supxlabel(across, fontsize="small")
    sheet.supylabel(up, fontsize="small")
    sheet.tight_layout()
    return sheet


def _forest(plan: Plan, made: Mapping[str, Mapping[str, Comparison]]) -> Figure:
    """Differences with their intervals; filled where the condition is told apart."""
    lines = [(": ".join(p for p in (panel, name) if p), c) for panel, part in made.items() for name, c in part.items()]
    sheet = Figure(figsize=(6.0, 0.8 + 0.28 * len(lines)))
    ax = sheet.subplots()
    for y, (_, c) in enumerate(reversed(lines)):
        ax.plot([c.low, c.high], [y, y], color="C0", linewidth=1.5)
        ax.plot(c.difference, y, marker="o", color="C0", fillstyle="full" if c.told_apart else "none", markersize=6)
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(lines)), [name for name, _ in reversed(lines)])
    ax.set_ylim(-0.7, len(lines) - 0.3)
    ax.set_xlabel(f"points above {plan.campaign.control}; 95 % over seeds; filled: told apart", fontsize="small")
    _quiet(ax)
    return sheet


def _bars(plan: Plan, rows: Rows) -> Figure:
    """A group for each panel and column, a bar for each condition."""
    columns = list(plan.campaign.columns)
    groups = [(panel, i) for panel in rows for i in range(len(columns))]
    names = list(plan.campaign.variants())
    sheet = Figure(figsize=(2.5 + 0.45 * len(groups) * len(names) ** 0.7, 3.4))
    ax = sheet.subplots()
    width = 0.8 / len(names)
    for n, name in enumerate(names):
        shown = [rows[panel][name][i] for panel, i in groups]
        places = [g + (n - (len(names) - 1) / 2) * width for g in range(len(groups))]
        reach = [[max(e.mean - e.low, 0) for e in shown], [max(e.high - e.mean, 0) for e in shown]]
        ax.bar(places, [e.mean for e in shown], width, yerr=reach, capsize=2, label=name)
    labels = ["\n".join(p for p in (panel, plan.campaign.heading(columns[i])) if p) for panel, i in groups]
    ax.set_xticks(range(len(groups)), labels)
    ax.legend(fontsize="small", frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _quiet(ax)
    return sheet


def _heatmap(plan: Plan, plot: Plot, runs: pd.DataFrame) -> Figure | None:
    """Mean accuracy over the pair of numbers that ``plot.key`` holds in each condition."""
    pairs: dict[tuple[str, str], Any] = {}
    for cell in plan.cells:
        value = flatten(cell.setting.config.model_dump(mode="json"))[plot.key or ""]
        pairs[cell.setting.panel, cell.setting.condition] = tuple(value)
    panels = list(plan.campaign.panels) or [""]
    sheet = Figure(figsize=(4.2 * len(panels), 3.4))
    drawn = False
    for ax, panel in zip(sheet.subplots(1, len(panels), squeeze=False).flatten(), panels):
        own = {name: pair for (at, name), pair in pairs.items() if at == panel}
        across, up = (sorted({pair[i] for pair in own.values()}) for i in (0, 1))
        grid = np.full((len(up), len(across)), math.nan)
        for name, by_seed in values_of(runs, panel, "accuracy").items():
            grid[up.index(own[name][1]), across.index(own[name][0])] = np.mean(list(by_seed.values()))
        drawn |= bool(np.isfinite(grid).any())
        ax.imshow(grid, origin="lower", aspect="auto", cmap="Blues", alpha=0.6)
        for (y, x), value in np.ndenumerate(grid):
            if np.isfinite(value):
                ax.text(x, y, f"{value:.1f}", ha="center", va="center", color="k", fontsize="small")
        ax.set_xticks(range(len(across)), [f"{v:g}" for v in across])
        ax.set_yticks(range(len(up)), [f"{v:g}" for v in up])
        ax.set_xlabel("lower cut-point", fontsize="small")
        ax.set_ylabel("upper cut-point", fontsize="small")
        ax.set_title(panel or str(plot.key), fontsize="small")
    sheet.tight_layout()
    return sheet if drawn else None


def _quiet(ax: Axes) -> None:
    ax.tick_params(labelsize="small")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
