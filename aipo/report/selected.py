"""What the update took of what was written: words, places, runs, and how scores go together."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import groupby
from typing import Any

import torch

from aipo.curriculum import NAMES
from aipo.mask import peaks as mi_peaks
from aipo.report.load import Row, Run

FEWEST = 8  # tokens of a word, below which its share is chance
WORDS = 20  # shown on either side
PLACES = 20  # bins along a completion
LONGEST = 10  # a run of selected tokens; longer ones count as this long
GRID = 28  # cells a side of the density
STEPS = 60  # read at most, spread over the run: a long run has more than a page can use


def describe(run: Run) -> dict[str, Any] | None:
    """Statistics of the rollouts in the update, for the page; None where nothing was recorded."""
    steps = spread(list(run.recorded()), STEPS)
    rows: list[tuple[int, Row]] = []
    for step in steps:
        rows += [(step, row) for group in run.groups(step) for row in group if row["used"] and row["tokens"]]
    if not rows:
        return None
    fifth = max(len(steps) // 5, 1)
    first, last = steps[fifth - 1], steps[-fifth]
    early, late = [row for step, row in rows if step <= first], [row for step, row in rows if step >= last]
    every = [row for _, row in rows]
    return {
        "steps": [steps[0], first, last, steps[-1]],
        "tokens": sum(len(row["mask"]) for row in every),
        "share": mean([m for row in every for m in row["mask"]]),
        "words": words(every),
        "places": [places(early), places(late)],
        "runs": [run_lengths(early), run_lengths(late)],
        "density": density(every),
        "peaks": peaks(early, late, run),
    }


def spread(items: list[int], count: int) -> list[int]:
    """At most ``count`` of the items, evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else 0.0


def words(rows: list[Row]) -> dict[str, list[tuple[str, int, int]]]:
    """Tokens selected most and least of the time, as (text, times selected, times written)."""
    written: Counter[str] = Counter()
    chosen: Counter[str] = Counter()
    counts: Counter[tuple[str, bool]] = Counter()
    for row in rows:
        counts.update(zip(row["tokens"], map(bool, row["mask"])))
    for (token, selected), count in counts.items():
        word = token.strip("Ġ▁ ") or token.replace(" ", "␣")
        word = word.replace("\n", "⏎").replace("Ċ", "⏎")
        written[word] += count
        chosen[word] += count * selected
    shares = [(word[:40], chosen[word], count) for word, count in written.items() if count >= FEWEST and word]
    shares.sort(key=lambda each: (-each[1] / each[2], -each[2], each[0]))
    most = shares[: min(WORDS, -(-len(shares) // 2))]
    return {"most": most, "least": shares[len(most) :][-WORDS:][::-1]}


def places(rows: list[Row]) -> list[float | None]:
    """Share selected along the completion, by twentieths."""
    counts = [[0, 0] for _ in range(PLACES)]
    for row in rows:
        length = len(row["mask"])
        for i, selected in enumerate(row["mask"]):
            place = counts[i * PLACES // length]
            place[0] += bool(selected)
            place[1] += 1
    return [round(chosen / total, 4) if total else None for chosen, total in counts]


def run_lengths(rows: list[Row]) -> list[float]:
    """Share of the selected stretches that are 1, 2, ... tokens long."""
    counts = Counter(
        min(sum(1 for _ in stretch), LONGEST) for row in rows for selected, stretch in groupby(row["mask"]) if selected
    )
    total = sum(counts.values())
    return [round(counts[length] / total, 4) if total else 0.0 for length in range(1, LONGEST + 1)]


def density(rows: list[Row]) -> dict[str, Any] | None:
    """How often MI and entropy of a token go together: counts on a grid, of tokens where both are known."""
    pairs = [
        (mi, entropy)
        for row in rows
        for mi, entropy in zip(row.get("mi") or (), row.get("entropy") or ())
        if mi is not None and entropy is not None
    ]
    if len(pairs) < 50:
        return None
    values = torch.tensor(pairs, dtype=torch.float64)  # (N, 2)
    low, high = torch.quantile(values[:100_000], torch.tensor([0.005, 0.995], dtype=torch.float64), dim=0)  # (2,) each
    if bool((high <= low).any()):
        return None
    cells = ((values - low) / (high - low) * GRID).long().clamp(0, GRID - 1)  # (N, 2)
    counts = torch.bincount(cells[:, 1] * GRID + cells[:, 0], minlength=GRID * GRID)
    centred = values - values.mean(0)
    r = float((centred[:, 0] * centred[:, 1]).sum() / centred.square().sum(0).sqrt().prod().clamp(min=1e-300))
    return {
        "size": GRID,
        "counts": counts.tolist(),
        "mi": [float(low[0]), float(high[0])],
        "entropy": [float(low[1]), float(high[1])],
        "pairs": len(pairs),
        "correlation": round(r, 3),
    }


def peaks(early: list[Row], late: list[Row], run: Run) -> dict[str, Any] | None:
    """How many peaks of MI (at ``mask.kappa_start``, not clipped) the completions of each bucket have, easiest first:
    ``counts``, and by bucket the share of completions with each count, early and late. Without a curriculum, or where
    the record does not know of buckets, all questions are one. None where nothing was scored."""
    kappa = run.config.get("mask.kappa_start", 0.3)
    statistic, tau = run.config.get("mask.statistic", "mean_std"), run.config.get("mask.tau", 1.5)
    probe = run.config.get("curriculum.probe_tokens", 512)
    found: defaultdict[str | None, list[Counter[int]]] = defaultdict(lambda: [Counter(), Counter()])
    for place, rows in enumerate((early, late)):
        for row in rows:
            scores = [value for value in (row.get("mi") or [])[:probe] if value is not None]
            if scores:
                count = int(mi_peaks(torch.tensor(scores), kappa=kappa, statistic=statistic, tau=tau).sum())
                found[row.get("bucket")][place][count] += 1
    if not found:
        return None
    every = {count for parts in found.values() for part in parts for count in part}
    counts = range(min(every), max(every) + 1)
    buckets = []
    for bucket in (*NAMES, None):
        if bucket in found:
            shares = [[round(part[n] / max(part.total(), 1), 4) for n in counts] for part in found[bucket]]
            buckets.append((bucket or "all questions", shares))
    return {"counts": [str(n) for n in counts], "buckets": buckets}
