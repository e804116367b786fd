"""Train every method on the embedded default and compare them:  python bench/compare.py [--quick] [--methods a,b]

Each run gets the same budget of generated tokens (dropped questions and continuations count) and is resumed or skipped
if it is there already, so the command may be stopped and started again. The table and the learning curves go to
bench/results/methods-MACHINE.md and .png.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

from aipo.config import CONFIG_FOLDER
from aipo.evaluation.results import markdown
from aipo.metrics import training_efficiency
from aipo.record.tracker import read_jsonl
from bench.machine import machine, slug

ROOT = Path(__file__).resolve().parents[1]
# About three and a half minutes a run on two cores: 23 methods with three seeds each take four hours.
FULL = {
    "rollout.questions_per_step": 8,
    "optim.generated_tokens": 14_000,  # ten steps of plain rollouts
    "optim.steps": 10,
    "validation.every": 5,
    "checkpoint.every": 10,
    "checkpoint.keep_last": 1,
}
QUICK = {
    "rollout.questions_per_step": 4,
    "optim.generated_tokens": 1_400,
    "optim.steps": 2,
    "validation.questions": 20,
    "validation.every": 2,
}


def run(method: str, seed: int, settings: dict[str, Any], folder: Path) -> Path | None:
    """Train, or go on, unless the run is finished. None if it failed."""
    name = f"{method}-seed{seed}"
    target = folder / name
    keys = {**settings, "name": name, "runs": folder, "seed": seed, "tracking.wandb": "disabled"}
    if (target / "summary.json").is_file():
        return target
    command = ["accelerate", "launch", "train.py", "--config", "smollm2_135m.yaml", "--method", method]
    command += ["--resume", "auto", *(f"{k}={v}" for k, v in keys.items())]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.log").open("a") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        print(f"{name} failed with exit code {done.returncode}: see {folder / name}.log", flush=True)
        return None
    for heavy in ("checkpoints", "final"):  # gigabytes a run; the numbers stay
        shutil.rmtree(target / heavy, ignore_errors=True)
    return target


def numbers(runs: Sequence[Path]) -> dict[str, Any]:
    """What the runs of one method came to, over its seeds."""
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    logs = [read_jsonl(run / "metrics.jsonl") for run in runs]
    after = [s["after"]["value"] for s in summaries]
    before = [s["before"]["value"] for s in summaries]
    otf = float(np.mean([s["otf"] for s in summaries]))
    mag = 100 * float(np.mean(np.array(after) - np.array(before)))
    steps = [line for log in logs for line in log if line["step"] > 0]
    seconds = [sum(v for k, v in line.items() if k.startswith("time/") and v is not None) for line in steps]
    return {
        "seeds": [int(run.name.rpartition("-seed")[2]) for run in runs],
        "steps": float(np.mean([s["steps"] for s in summaries])),
        "tokens": float(np.mean([sum(line["rollout/tokens"] for line in log if line["step"] > 0) for log in logs])),
        "after": after,
        "low": min(s["after"]["low"] for s in summaries),
        "high": max(s["after"]["high"] for s in summaries),
        "mag": mag,
        "otf": 100 * otf,
        "cost_share": 100 * float(np.mean([s["cost_share"] for s in summaries])),
        "tes": training_efficiency(mag, 100 * otf) if otf > 0 else math.nan,
        "seconds": float(np.median(seconds)),
        "memory": max(s["peak_memory_bytes"]["host"] for s in summaries) / 2**30,
        "curves": [curve(log) for log in logs],
    }


def curve(log: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(thousands of tokens generated so far, held-out accuracy) wherever it was measured."""
    points, tokens = [], 0.0
    for line in log:
        tokens += line.get("rollout/tokens") or 0.0
        if line.get("validation/accuracy") is not None:
            points.append((tokens / 1000, line["validation/accuracy"]))
    return points


def table(found: dict[str, dict[str, Any]]) -> str:
    columns = ["method", "seeds", "held-out avg@4, %", "range over seeds", "95 % within a run", "MAG", "OTF, %", "TES"]
    columns += ["cost share, %", "steps", "tokens", "s/step", "peak GiB"]
    cells = []
    for name, n in sorted(found.items(), key=lambda item: -float(np.mean(item[1]["after"]))):
        after = [100 * value for value in n["after"]]
        cells.append(
            [
                name,
                str(len(n["seeds"])),
                f"{np.mean(after):.1f}",
                f"{min(after):.1f} – {max(after):.1f}",
                f"{100 * n['low']:.1f} – {100 * n['high']:.1f}",
                f"{n['mag']:+.1f}",
                f"{n['otf']:.1f}",
                f"{n['tes']:.0f}",
                f"{n['cost_share']:.1f}",
                f"{n['steps']:.0f}",
                f"{n['tokens']:,.0f}",
                f"{n['seconds']:.1f}",
                f"{n['memory']:.1f}",
            ]
        )
    return markdown(columns, cells)


def curves(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Held-out accuracy by thousands of generated tokens, a panel for each method: its seeds, in grey all others."""
    columns = 4
    rows = -(-len(found) // columns)
    sheet = Figure(figsize=(3.2 * columns, 2.2 * rows))
    axes = sheet.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for ax, (name, n) in zip(axes, found.items()):
        for other in found.values():
            for points in other["curves"]:
                ax.plot(*zip(*points), color="0.9", linewidth=0.8)
        for points in n["curves"]:
            ax.plot(*zip(*points), linewidth=1.2, marker=".")
        ax.set_title(name, fontsize="small")
        ax.tick_params(labelsize="x-small")
    for ax in axes[len(found) :]:
        ax.set_axis_off()
    sheet.supxlabel("thousand generated tokens", fontsize="small")
    sheet.supylabel("held-out accuracy; a line for each seed", fontsize="small")
    sheet.tight_layout()
    sheet.savefig(path, dpi=90)


def distinguishable(found: dict[str, dict[str, Any]], control: str = "random_mask") -> str:
    """Which methods differ from the control by more than chance: t-tests paired by seed, Holm's correction.

    Runs of one seed share the initial samples, the order of questions and the held-out draws.
    """
    after = {name: dict(zip(n["seeds"], n["after"])) for name, n in found.items()}
    base = after.pop(control, {})
    differences = {
        name: [100 * (values[seed] - base[seed]) for seed in values if seed in base] for name, values in after.items()
    }
    differences = {name: values for name, values in differences.items() if len(values) > 1}
    if not differences:
        return "With one seed a method nothing can be told apart.\n"
    p = {name: float(ttest_1samp(values, 0).pvalue) for name, values in differences.items()}
    lines = []
    for i, name in enumerate(sorted(p, key=lambda name: p[name])):
        if not p[name] * (len(p) - i) < 0.05:
            break
        lines.append(f"{name} ({np.mean(differences[name]):+.1f} points, p {p[name]:.4f})")
    spread = float(np.mean([np.std(values, ddof=1) for values in differences.values()]))
    told = f"differ from it: {', '.join(lines)}" if lines else "none differs from it"
    return (
        f"Against {control} (t-tests paired by seed, Holm's correction for {len(p)} comparisons, 5 %): {told}. "
        f"The standard deviation of a difference over seeds is {spread:.1f} points on average.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in (CONFIG_FOLDER / "methods").glob("*.yaml"))
    parser.add_argument("--quick", action="store_true", help="two steps of one seed each, to see that all works")
    parser.add_argument("--methods", default=",".join(known), help="by comma (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=None, help="folder of the runs (default: runs/compare)")
    options = parser.parse_args()
    settings = QUICK if options.quick else FULL
    folder = (options.runs or Path("runs") / ("compare-quick" if options.quick else "compare")).resolve()
    methods = options.methods.split(",")
    jobs = [(method, seed) for seed in range(1 if options.quick else options.seeds) for method in methods]
    runs: dict[str, list[Path]] = {}
    failed = []
    for i, (method, seed) in enumerate(jobs, start=1):
        print(f"{i}/{len(jobs)} {method}, seed {seed}", flush=True)
        if (finished := run(method, seed, settings, folder)) is not None:
            runs.setdefault(method, []).append(finished)
        else:
            failed.append(f"{method} (seed {seed})")
    if failed:
        print(f"failed: {', '.join(failed)}; start again to go on with them")
    if not runs:
        return 1
    found = {method: numbers(each) for method, each in runs.items()}
    budget = settings["optim.generated_tokens"]
    text = f"# Methods on the embedded default\n\n{machine()}; {budget:,} generated tokens a run.\n\n{table(found)}\n"
    text += distinguishable(found)
    text += "OTF is of the completion tokens that the updates read, the cost share of all that were generated.\n"
    if options.quick or failed or methods != known:  # what is committed compares all
        print(text)
        return 1 if failed else 0
    target = ROOT / "bench" / "results" / f"methods-{slug()}"
    target.parent.mkdir(exist_ok=True)
    curves(found, target.with_suffix(".png"))
    target.with_suffix(".md").write_text(text)
    print(text + f"\nwritten to {target}.md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
