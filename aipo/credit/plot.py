"""A picture of the table of credit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from aipo.credit.table import RESAMPLES, STATISTICS, Credit, Numbers, bootstrap, filled, resamples


def plot(signals: dict[str, Numbers], credit: Credit, path: Path) -> None:
    """AUROC of each signal with its interval, sorted; the dotted line is chance."""
    found, drawn = [], list(resamples(credit, RESAMPLES))
    for name, values in signals.items():
        found.append((*bootstrap(filled(values), credit, STATISTICS["AUROC"], drawn), name))
    found.sort(key=lambda each: each[0])
    sheet = Figure(figsize=(7, 0.22 * len(found) + 1))
    ax = sheet.subplots()
    places = np.arange(len(found))
    middle, low, high = (np.array([each[i] for each in found]) for i in range(3))
    ax.errorbar(middle, places, xerr=np.abs([middle - low, high - middle]), fmt="o", markersize=3, linewidth=1)
    ax.axvline(0.5, color="0.6", linestyle=":")
    ax.set_yticks(places, [each[3] for each in found], fontsize="x-small")
    ax.margins(y=0.01)
    ax.set_xlabel("AUROC for tokens that change the value\nby more than twice its standard error")
    sheet.savefig(path, dpi=90, bbox_inches="tight")
