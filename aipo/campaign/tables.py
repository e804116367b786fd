"""The tables of a campaign as the paper prints them, and what differs from the control; markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from aipo.campaign.cells import Plan
from aipo.campaign.collect import values_of
from aipo.campaign.schema import LOWER_IS_BETTER, Campaign
from aipo.campaign.statistics import Comparison, compare
from aipo.evaluation.results import markdown as grid
from aipo.inputs import data_sets
from aipo.metrics import bootstrap_interval


@dataclass(frozen=True)
class Entry:
    """Mean over seeds with its 95 % bootstrap interval; ``printed`` is the paper's. NaN where nothing is there."""

    mean: float
    low: float
    high: float
    seeds: int
    asked: int  # seeds of the campaign
    printed: float | None = None
    rank: int = 0  # 1 the best of its panel, 2 the second

    def text(self, digits: int) -> str:
        if math.isnan(self.mean):
            shown = "–"
        elif self.seeds == 1:
            shown = f"{self.mean:,.{digits}f}"
        else:
            shown = f"{self.mean:,.{digits}f} [{self.low:,.{digits}f}, {self.high:,.{digits}f}]"
        if 0 < self.seeds < self.asked:
            shown += f" ({self.seeds} of {self.asked})"
        return shown if self.printed is None else f"{shown} ({self.printed:g})"


Rows = dict[str, dict[str, list[Entry]]]  # panel -> condition -> one for each column


def entries(campaign: Campaign, runs: pd.DataFrame) -> Rows:
    rows: Rows = {}
    for panel in campaign.panels or [""]:
        columns = [values_of(runs, panel, column) for column in campaign.columns]
        part = {
            name: [_entry(values.get(name, {}), len(campaign.seeds)) for values in columns]
            for name in campaign.variants()
        }
        for i, column in enumerate(campaign.columns):
            printed = campaign.printed.get(panel, {})
            for name, line in part.items():
                line[i] = replace(line[i], printed=printed[name][i] if name in printed else None)
            _rank(part, i, digits(column), lower=column in LOWER_IS_BETTER)
        rows[panel] = part
    return rows


def _entry(by_seed: dict[int, float], asked: int) -> Entry:
    values = list(by_seed.values())
    if not values:
        return Entry(math.nan, math.nan, math.nan, 0, asked)
    return Entry(float(np.mean(values)), *bootstrap_interval(values, 0), len(values), asked)


def _rank(part: dict[str, list[Entry]], column: int, places: int, *, lower: bool) -> None:
    """Mark the best and the second of a column, equal ones alike, as they are shown with so many decimal places."""
    means = {name: line[column].mean for name, line in part.items()}
    shown = {name: round(mean, places) for name, mean in means.items() if not math.isnan(mean)}
    order = sorted(set(shown.values()), reverse=not lower)[:2]
    for name, value in shown.items():
        if len(order) > 1 and value in order:
            part[name][column] = replace(part[name][column], rank=1 + order.index(value))


def digits(column: str) -> int:
    return {"steps": 0, "tokens": 0, "best_step": 0, "otf": 2, "mag": 2, "tes": 2}.get(column, 1)


def markdown(campaign: Campaign, rows: Rows) -> str:
    """Best bold, second underlined, a line for each panel."""
    head = [campaign.label, *map(campaign.heading, campaign.columns)]
    lines = []
    for panel, part in rows.items():
        lines += [[f"*{panel}*", *[""] * len(campaign.columns)]] if panel else []
        for name, line in part.items():
            texts = [entry.text(digits(column)) for column, entry in zip(campaign.columns, line)]
            marks = [("**", "**") if e.rank == 1 else ("<u>", "</u>") if e.rank == 2 else ("", "") for e in line]
            lines.append([name, *(f"{a}{text}{b}" for text, (a, b) in zip(texts, marks))])
    return grid(head, lines)


def latex(campaign: Campaign, rows: Rows, note: str) -> str:
    """A booktabs table with the note below it."""
    columns = list(campaign.columns)
    out = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    out.append(" & ".join(map(_escape, [campaign.label, *map(campaign.heading, columns)])) + r" \\")
    for panel, part in rows.items():
        out.append(r"\midrule")
        if panel:
            out.append(rf"\multicolumn{{{len(columns) + 1}}}{{l}}{{\textit{{{_escape(panel)}}}}} \\")
        for name, line in part.items():
            texts = [_escape(entry.text(digits(column))) for column, entry in zip(columns, line)]
            marked = [
                rf"\textbf{{{t}}}" if e.rank == 1 else rf"\underline{{{t}}}" if e.rank == 2 else t
                for t, e in zip(texts, line)
            ]
            out.append(" & ".join([_escape(name), *marked]) + r" \\")
    out += [r"\bottomrule", r"\end{tabular}", f"% {note}"]
    return "\n".join(out) + "\n"


def _escape(text: str) -> str:
    special = {sign: f"\\{sign}" for sign in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    special |= {"κ": r"$\kappa$", "–": "--"}
    return "".join(special.get(sign, sign) for sign in text)


def table_csv(campaign: Campaign, rows: Rows) -> str:
    """A line for each panel, condition and column."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["panel", "condition", "column", "mean", "low", "high", "seeds", "paper"])
    for panel, part in rows.items():
        for name, line in part.items():
            for column, e in zip(campaign.columns, line):
                writer.writerow([panel, name, column, e.mean, e.low, e.high, e.seeds, e.printed])
    return file.getvalue()


def comparisons(campaign: Campaign, runs: pd.DataFrame) -> dict[str, dict[str, Comparison]]:
    """panel -> condition -> against the control, by the campaign's metric."""
    if campaign.control is None:
        return {}
    panels = campaign.panels or [""]
    return {panel: compare(values_of(runs, panel, "accuracy"), campaign.control) for panel in panels}


def comparison_markdown(campaign: Campaign, made: dict[str, dict[str, Comparison]]) -> str:
    head = [campaign.label, "seeds", f"difference from {campaign.control}", "95 %", "p", "p, Holm", "", "seeds needed"]
    lines = []
    for panel, part in made.items():
        lines += [[f"*{panel}*", *[""] * (len(head) - 1)]] if panel and part else []
        for name, c in part.items():
            verdict = "told apart" if c.told_apart else "untestable" if math.isnan(c.p) else "not told apart"
            p = ["–" if math.isnan(each) else f"{each:.4f}" for each in (c.p, c.adjusted)]
            interval = f"[{c.low:+.1f}, {c.high:+.1f}]" if c.seeds > 1 else "–"
            needed = "" if c.told_apart else str(c.needed or ("–" if math.isnan(c.p) else "> 1,000"))
            lines.append([name, str(c.seeds), f"{c.difference:+.1f}", interval, *p, verdict, needed])
    return grid(head, lines)


def note(plan: Plan, runs: pd.DataFrame, machine: str) -> str:
    """At which scale the figures were made, in a line."""
    configs = [cell.setting.config for cell in plan.cells]
    models = ", ".join(sorted({config.model.path for config in configs}))
    sets = [each for config in configs for each in data_sets(config).items()]
    data = ", ".join(sorted({source.path for name, source in sets if name.startswith("train")}))
    steps = _span([config.optim.steps for config in configs])
    rollouts = _span([config.rollout.questions_per_step * config.rollout.samples_per_question for config in configs])
    campaign, done = plan.campaign, int((runs["state"] == "done").sum())
    evaluation = ""
    if campaign.evaluate:
        evaluation = f"; avg@{campaign.evaluate.samples} on {', '.join(campaign.evaluate.benchmarks)}"
    scales = {"laptop": "laptop scale, not the paper's", "paper": "the paper's scale", "own": "own scale"}
    beside = " In round brackets the paper's figures." if campaign.printed else ""
    return (
        f"Made at {scales[campaign.scale]}: {models} on {data}, at most {steps} steps of {rollouts} rollouts, seeds "
        f"{', '.join(map(str, campaign.seeds))}{evaluation}; {machine}; {done} of {len(runs)} cells are there.{beside}"
    )


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"
