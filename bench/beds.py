"""Train every selection of tokens on a bed, over many seeds:  python bench/beds.py chain [--seeds 8] [--conditions a,b]

All through train.py's own path, one run after the other in this process. Each finished run is a line of
bench/results/beds-NAME.jsonl, and is not made again: the command may be stopped and started. The table goes beside it.
The bed itself is made by python -m aipo.beds. More keys may follow, for other settings of a bed under another --name.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.figure import Figure

from aipo.campaign.statistics import holm, paired_p
from aipo.config import CONFIG_FOLDER, load_config
from aipo.evaluation.results import markdown
from aipo.record.jsonl import JsonlLog, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
CONDITIONS = CONFIG_FOLDER / "beds" / "conditions"
CONTROLS = ("oracle", "all", "random", "inverse", "fillers")
Row = dict[str, Any]


def run_one(bed: str, condition: str, seed: int, folder: Path, overrides: Sequence[str], device: Any) -> Row:
    """One training run, from the config to the numbers of its log."""
    from aipo.run import run

    name = f"{condition}-seed{seed}"
    shutil.rmtree(folder / name, ignore_errors=True)  # one that was killed; a run is shorter than a checkpoint pays
    keys = [f"name={name}", f"runs={folder}", f"seed={seed}", *overrides]
    config = load_config(f"beds/{bed}.yaml", keys, method=str(CONDITIONS / f"{condition}.yaml"))
    start = time.perf_counter()
    if not run(config, device=device):
        raise KeyboardInterrupt  # asked to stop: a run that is cut short is no result
    seconds = time.perf_counter() - start
    log = read_jsonl(folder / name / "metrics.jsonl")
    shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)
    curve = [(line["step"], line["validation/accuracy"]) for line in log if line.get("validation/accuracy") is not None]
    return {
        "bed": bed,
        "condition": condition,
        "seed": seed,
        "settings": list(overrides),
        "curve": curve,
        "selected": float(np.mean([line["mask/otf"] for line in log if line.get("mask/otf") is not None])),
        "seconds": round(seconds, 1),
    }


def area(curve: Sequence[tuple[int, float]]) -> float:
    """Mean accuracy over the steps, by trapezes."""
    steps, values = zip(*curve)
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def paired(rows: Sequence[Row], first: str, second: str) -> tuple[float, float, int]:
    """Mean difference in final accuracy, points, its two-sided p (t-test paired by seed), and the number of pairs.

    NaN with fewer than two pairs; p also where all pairs differ alike.
    """
    final = {(row["condition"], row["seed"]): 100 * row["curve"][-1][1] for row in rows}
    seeds = sorted({seed for name, seed in final if name == first} & {seed for name, seed in final if name == second})
    a, b = ([final[name, seed] for seed in seeds] for name in (first, second))
    if len(seeds) < 2:
        return float("nan"), float("nan"), len(seeds)
    differences = np.subtract(a, b).tolist()
    return float(np.mean(differences)), paired_p(differences), len(seeds)


def table(rows: Sequence[Row]) -> str:
    """A line a condition, by final accuracy; differences from random and their corrected p."""
    names = sorted({row["condition"] for row in rows})
    tests = {name: paired(rows, name, "random") for name in names if name != "random"}
    adjusted = dict(zip(tests, holm([p for _, p, _ in tests.values()])))
    cells = []
    for name in names:
        own = [row for row in rows if row["condition"] == name]
        final = [100 * row["curve"][-1][1] for row in own]
        areas = [100 * area(row["curve"]) for row in own]
        difference, p, _ = tests.get(name, (0.0, float("nan"), 0))
        cells.append(
            [
                name,
                str(len(own)),
                f"{100 * np.mean([row['curve'][0][1] for row in own]):.1f}",
                f"{np.mean(final):.1f}",
                f"{np.std(final, ddof=1):.1f}" if len(own) > 1 else "",
                f"{np.mean(areas):.1f}",
                "" if name == "random" or difference != difference else f"{difference:+.1f}",
                "" if p != p else f"{adjusted[name]:.2g}",
                f"{100 * np.mean([row['selected'] for row in own]):.0f}",
                f"{np.median([row['seconds'] for row in own]):.0f}",
            ]
        )
    columns = ["condition", "seeds", "before, %", "after, %", "sd over seeds", "area, %", "against random", "p (Holm)"]
    return markdown([*columns, "tokens, %", "s/run"], sorted(cells, key=lambda cell: -float(cell[3])))


def counts(rows: Sequence[Row]) -> str:
    """Whether the bed counts: oracle beats random and random beats inverse, both with a corrected p below 1 %."""
    pairs = [("oracle", "random"), ("random", "inverse")]
    found = {f"{a} - {b}": paired(rows, a, b) for a, b in pairs}
    adjusted = dict(zip(found, holm([p for _, p, _ in found.values()])))
    passed = all(found[name][0] > 0 and adjusted[name] < 0.01 for name in found)
    told = "; ".join(
        f"{name}: {difference:+.1f} points, p {adjusted[name]:.2g}, {seeds} seeds"
        for name, (difference, _, seeds) in found.items()
    )
    return f"The bed {'counts' if passed else 'does not count'} ({told})."


def curves(rows: Sequence[Row], path: Path) -> None:
    """Mean accuracy over steps with a band of one standard deviation over seeds."""
    sheet = Figure(figsize=(7, 4))
    ax = sheet.subplots()
    for name in sorted({row["condition"] for row in rows}):
        own = [row["curve"] for row in rows if row["condition"] == name]
        steps = [step for step, _ in own[0]]
        values = 100 * np.array([[value for _, value in curve] for curve in own])  # (seeds, points)
        (line,) = ax.plot(steps, values.mean(0), label=f"{name} ({len(own)})")
        ax.fill_between(
            steps, values.mean(0) - values.std(0), values.mean(0) + values.std(0), color=line.get_color(), alpha=0.15
        )
    ax.set_xlabel("step")
    ax.set_ylabel("held-out accuracy, %; band: one standard deviation over seeds")
    ax.legend(fontsize="x-small")
    sheet.tight_layout()
    sheet.savefig(path, dpi=90)


def write(name: str, target: Path) -> str:
    rows = read_jsonl(target.with_suffix(".jsonl"))
    text = f"# Bed {name}\n\n{table(rows)}\n{counts(rows)}\n"
    target.with_suffix(".md").write_text(text)
    curves(rows, target.with_suffix(".png"))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in CONDITIONS.glob("*.yaml"))
    parser.add_argument("bed", help="a config of configs/beds")
    parser.add_argument("--name", help="of the results (default: the bed)")
    parser.add_argument("--conditions", default=",".join(known), help="by comma (default: all)")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--table", action="store_true", help="only make the table of what is there")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args()
    name = options.name or options.bed
    target = ROOT / "bench" / "results" / f"beds-{name}"
    if options.table:
        print(write(name, target))
        return 0
    facts = ROOT / "data" / "beds" / name / "bed.json"
    if not facts.is_file():
        print(f"error: the bed {name} is not there: python -m aipo.beds makes it", file=sys.stderr)
        return 2
    accuracy = json.loads(facts.read_text())["accuracy"]
    print(f"{name}: base policy right in {accuracy:.1%}", flush=True)

    from aipo import distributed
    from aipo.threads import settle

    settle()
    done = {(row["condition"], row["seed"]) for row in read_jsonl(target.with_suffix(".jsonl"))}
    jobs = [(seed, condition) for seed in range(options.seeds) for condition in options.conditions.split(",")]
    jobs = [(seed, condition) for seed, condition in jobs if (condition, seed) not in done]

    def work(device: Any) -> None:
        log = JsonlLog(target.with_suffix(".jsonl"))
        for i, (seed, condition) in enumerate(jobs, start=1):
            row = run_one(options.bed, condition, seed, ROOT / "runs" / "beds" / name, options.overrides, device)
            log.append(row)
            final = row["curve"][-1][1]
            print(f"{i}/{len(jobs)} {condition}, seed {seed}: {final:.1%} after {row['seconds']} s", flush=True)
        log.close()

    try:
        code = distributed.launch(work)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return 130
    print(write(name, target))
    return code


if __name__ == "__main__":
    sys.exit(main())
