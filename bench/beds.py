"""Train every selection of tokens on a bed, over many seeds:  python bench/beds.py chain [--seeds 8] [--conditions a,b]

All through train.py's own path, one run after the other in this process. Each finished run is a line of
beds-NAME.jsonl in bench/results, and is not made again: the command may be stopped and started. Table and curves go
beside it, and beds.png, the main curves of all beds there; --out DIR makes all anew. The bed itself is made by
python -m aipo.beds. More keys may follow, for other settings of a bed under another --name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd

from aipo.campaign.plots import Band, band, draw_bands
from aipo.campaign.statistics import compare, holm, paired_p
from aipo.config import CONFIG_FOLDER, Config, load_config
from aipo.errors import UserError, exit_code
from aipo.evaluation.results import markdown
from aipo.record.jsonl import JsonlLog, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
CONDITIONS = CONFIG_FOLDER / "beds" / "conditions"
CONTROLS = ("oracle", "all", "random", "inverse", "fillers")
SHOWN = ("oracle", "all", "random", "inverse", "surprisal", "mi_position", "mi")  # in the picture of all beds
Row = dict[str, Any]


def configured(bed: str, condition: str, keys: Sequence[str]) -> Config:
    return load_config(f"beds/{bed}.yaml", keys, method=str(CONDITIONS / f"{condition}.yaml"))


def made_of(config: Config) -> tuple[str, str]:
    """Digests of what a run is made of but for its seed: all of it, and data and weights alone."""
    from aipo.inputs import check_inputs

    facts = {key: value for key, value in check_inputs(config, world=1).identity.items() if key != "seed"}
    facts |= {"optim.steps": config.optim.steps, "optim.lr": config.optim.lr}  # which a run may change as it goes on
    bed = {key: value for key, value in facts.items() if "fingerprint" in key or key.startswith("weights")}
    whole, part = (hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()[:16] for each in (facts, bed))
    return whole, part


def run_one(bed: str, condition: str, seed: int, folder: Path, overrides: Sequence[str], device: Any) -> Row:
    """One training run, from the config to the numbers of its log."""
    from aipo.run import run

    name = f"{condition}-seed{seed}"
    shutil.rmtree(folder / name, ignore_errors=True)  # one that was killed; a run is shorter than a checkpoint pays
    config = configured(bed, condition, [f"name={name}", f"runs={folder}", f"seed={seed}", *overrides])
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


def finals(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """condition -> seed -> final accuracy, %."""
    found: dict[str, dict[int, float]] = {name: {} for name in sorted({row["condition"] for row in rows})}
    for row in rows:
        found[row["condition"]][row["seed"]] = 100 * row["curve"][-1][1]
    return found


def contrasts(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[tuple[float, float, int]]:
    """Of each pair of conditions the mean difference in final accuracy, points, its two-sided p (t-test paired by
    seed, Holm's correction for these pairs), and the number of seeds.

    NaN with fewer than two seeds; p also where all differ alike.
    """
    final = finals(rows)
    seeds = [sorted(final.get(a, {}).keys() & final.get(b, {}).keys()) for a, b in pairs]
    found = [[final[a][seed] - final[b][seed] for seed in own] for (a, b), own in zip(pairs, seeds)]
    means = [float(np.mean(each)) if len(each) > 1 else float("nan") for each in found]
    return list(zip(means, holm([paired_p(each) for each in found]), map(len, found)))


def told(pairs: Sequence[tuple[str, str]], made: Sequence[tuple[float, float, int]]) -> str:
    return "; ".join(
        f"{a} - {b}: {difference:+.1f} points, p {p:.2g}, {seeds} seeds"
        for (a, b), (difference, p, seeds) in zip(pairs, made)
        if seeds > 1
    )


def table(rows: Sequence[Row]) -> str:
    """A line a condition, by final accuracy; differences from random with a 95 % interval and their corrected p."""
    final = finals(rows)
    against = compare(final, "random")
    cells = []
    for name, by_seed in final.items():
        own, after = [row for row in rows if row["condition"] == name], list(by_seed.values())
        several = against.get(name) if len(after) > 1 else None
        cells.append(
            [
                name,
                str(len(own)),
                f"{100 * np.mean([row['curve'][0][1] for row in own]):.1f}",
                f"{np.mean(after):.1f}",
                f"{np.std(after, ddof=1):.1f}" if len(after) > 1 else "",
                f"{np.mean([100 * area(row['curve']) for row in own]):.1f}",
                f"{several.difference:+.1f} ({several.low:+.1f} to {several.high:+.1f})" if several else "",
                f"{several.adjusted:.2g}" if several and several.adjusted == several.adjusted else "",
                f"{100 * np.mean([row['selected'] for row in own]):.0f}",
                f"{np.median([row['seconds'] for row in own]):.0f}",
            ]
        )
    columns = ["condition", "seeds", "before, %", "after, %", "sd over seeds", "area, %", "against random (95 %)"]
    return markdown([*columns, "p (Holm)", "tokens, %", "s/run"], sorted(cells, key=lambda cell: -float(cell[3])))


def counts(rows: Sequence[Row]) -> str:
    """Whether the bed counts: oracle beats random and random beats inverse, both with a corrected p below 1 %."""
    pairs = [("oracle", "random"), ("random", "inverse")]
    made = contrasts(rows, pairs)
    passed = all(difference > 0 and p < 0.01 for difference, p, _ in made)
    seen = told(pairs, made) or "fewer than two seeds of each"
    return f"The bed {'counts' if passed else 'does not count'} ({seen})."


def twins(rows: Sequence[Row]) -> str:
    """Each reading of the mutual information against the same with the gold answer of another question."""
    names = {row["condition"] for row in rows}
    pairs = [(name, f"{name}_wrong_gold") for name in sorted(names) if f"{name}_wrong_gold" in names]
    text = told(pairs, contrasts(rows, pairs))
    return f"Right against wrong gold: {text}." if text else ""


def best(rows: Sequence[Row]) -> str:
    """The signal that ended highest against controls and every other signal, and the oracle's tokens against all.

    It was chosen by what it is tested on: its p are too small.
    """
    final = finals(rows)
    signals = [name for name in final if name not in CONTROLS and not name.endswith("_wrong_gold")]
    signals.sort(key=lambda name: -float(np.mean(list(final[name].values()))))
    pairs = [(name, other) for name in signals[:1] for other in ("oracle", "all", "random", *signals[1:])]
    said = [
        ("The controls", told([("oracle", "all")], contrasts(rows, [("oracle", "all")]))),
        ("The signal that ended highest", told(pairs, contrasts(rows, pairs))),
    ]
    return "\n\n".join(f"{what}: {text}." for what, text in said if text)


def curve(rows: Sequence[Row], condition: str) -> Band:
    """Accuracy in % over steps of one condition."""
    points = [
        {"seed": row["seed"], "step": step, "accuracy": 100 * value}
        for row in rows
        if row["condition"] == condition
        for step, value in row["curve"]
    ]
    return band(pd.DataFrame(points), "accuracy", "step")


def picture(bands: Mapping[tuple[str, str], Band], path: Path) -> None:
    sheet = draw_bands(bands, across="step", up="held-out accuracy, %; mean and 95 % over seeds")
    sheet.savefig(path, dpi=80, bbox_inches="tight")


def write(name: str, target: Path) -> str:
    rows = read_jsonl(target.with_suffix(".jsonl"))
    parts = [f"# Bed {name}", table(rows).rstrip(), counts(rows), twins(rows), best(rows)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    target.with_suffix(".md").write_text(text)
    final = finals(rows)
    names = sorted(final, key=lambda name: -float(np.mean(list(final[name].values()))))
    picture({("", condition): curve(rows, condition) for condition in names}, target.with_suffix(".png"))
    files = {path.stem.removeprefix("beds-"): path for path in target.parent.glob("beds-*.jsonl")}
    beds = {bed: read_jsonl(files[bed]) for bed in sorted(files)}
    made = [(bed, each) for bed, own in beds.items() for each in SHOWN if any(row["condition"] == each for row in own)]
    if made:
        picture(
            {(bed, condition): curve(beds[bed], condition) for bed, condition in made}, target.with_name("beds.png")
        )
    return text


def world(row: Row) -> list[str]:
    """The bed of a run, with the keys that name another model or other data."""
    return [row["bed"], *sorted(key for key in row["settings"] if key.startswith(("model.path=", "data.")))]


def check(rows: Sequence[Row], asked: Row, target: Path) -> None:
    """UserError unless the rows of a file are of the bed and the keys that its next ones are asked with."""
    if any(world(row) != world(asked) for row in rows):
        raise UserError(f"{target} is of {' '.join(world(rows[0]))}, not of {' '.join(world(asked))}: another --name")
    if other := {row["condition"] for row in rows if row["settings"] != asked["settings"]} & {*asked["conditions"]}:
        raise UserError(f"{target} has {', '.join(sorted(other))} with other keys: another --name")


def check_made(rows: Sequence[Row], made: Mapping[str, tuple[str, str]], target: Path) -> None:
    """UserError if data, weights or settings have changed since the rows were made, as far as these say."""
    for row in (row for row in rows if "made_of" in row):
        settings, bed = row["made_of"]
        if any(bed != now for _, now in made.values()):
            raise UserError(f"{target} is of other data or weights of the bed than there are now: another --name")
        if row["condition"] in made and settings != made[row["condition"]][0]:
            raise UserError(f"{target} has {row['condition']} by other settings than there are now: another --name")


@exit_code
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in CONDITIONS.glob("*.yaml"))
    parser.add_argument("bed", help="a config of configs/beds")
    parser.add_argument("--name", help="of the results (default: the bed)")
    parser.add_argument("--conditions", default=",".join(known), help="by comma (default: all)")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    parser.add_argument("--table", action="store_true", help="only make the table of what is there")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_intermixed_args()
    name = options.name or options.bed
    target = options.out / f"beds-{name}"
    if options.table:
        print(write(name, target))
        return 0
    asked = options.conditions.split(",")
    file = target.with_suffix(".jsonl")
    rows = read_jsonl(file)
    check(rows, {"bed": options.bed, "settings": options.overrides, "conditions": asked}, file)
    facts = ROOT / Path(load_config(f"beds/{options.bed}.yaml", options.overrides).model.path).parent / "bed.json"
    if not facts.is_file():
        raise UserError(f"the bed {facts.parent} is not there: python -m aipo.beds makes it")
    options.out.mkdir(parents=True, exist_ok=True)
    bed = json.loads(facts.read_text())
    print(f"{name}: base policy right in {bed['accuracy']:.1%}", flush=True)
    for condition in asked:
        config = configured(options.bed, condition, options.overrides)
        sigma, median = config.mi.sigma, bed["sigma"]
        if config.mask.score == "mi" and isinstance(sigma, float) and not 0.8 < sigma / median < 1.25:
            print(f"note: {condition} has the bandwidth {sigma:g}, the bed's median is {median:g}", flush=True)

    from aipo import distributed
    from aipo.threads import settle

    settle()
    done = {(row["condition"], row["seed"]) for row in rows}
    jobs = [(seed, condition) for seed in range(options.seeds) for condition in asked]
    jobs = [(seed, condition) for seed, condition in jobs if (condition, seed) not in done]

    def work(device: Any) -> None:
        wanted = dict.fromkeys(condition for _, condition in jobs)
        made = {each: made_of(configured(options.bed, each, options.overrides)) for each in wanted}
        check_made(rows, made, file)
        log = JsonlLog(file)
        for i, (seed, condition) in enumerate(jobs, start=1):
            row = run_one(options.bed, condition, seed, ROOT / "runs" / "beds" / name, options.overrides, device)
            log.append(row | {"made_of": made[condition]})
            final = row["curve"][-1][1]
            print(f"{i}/{len(jobs)} {condition}, seed {seed}: {final:.1%} after {row['seconds']} s", flush=True)
        log.close()

    try:
        code = distributed.launch(work)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return 130
    if code == 0:
        print(write(name, target))
    return code


if __name__ == "__main__":
    sys.exit(main())
