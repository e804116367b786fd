"""How well the mutual information finds the tokens that decide, by its bandwidth:  python bench/bandwidth.py chain fork

Of demonstrations at the base policy of a bed with its default knobs (python -m aipo.beds makes it): AUROC of the
coordinate scores for the critical tokens, mean within a demonstration, and the median bandwidth where each token is
predicted. --run reads training runs on such a world instead, its knobs as they may be. Step by step: the AUROC of their
scores, and the share of their masks that is critical. By gold answer: how often the last critical token was selected,
and the mean reward in the last third of the steps. All rollouts must have been recorded (tracking.rollouts_per_step).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aipo.beds.base_policy import END, states
from aipo.beds.worlds import WORLDS
from aipo.credit.table import auroc
from aipo.evaluation.results import markdown
from aipo.mi import Sigma, coordinate_scores, median_bandwidth

BEDS = Path(__file__).resolve().parents[1] / "data" / "beds"
BANDWIDTHS: list[Sigma] = [0.75, 2.0, 5.0, 8.0, 12.0, 20.0, "median"]
QUESTIONS = 64


def at_base_policy(name: str) -> tuple[list[str], str]:
    """A row of the table, and the median bandwidths by place."""
    model = AutoModelForCausalLM.from_pretrained(BEDS / name / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BEDS / name / "model")
    world, draw = WORLDS[name], random.Random(9)
    examples = [world.draw(draw, world.knobs) for _ in range(QUESTIONS)]
    shown = [[*example.demonstration, END] for example in examples]
    hidden = states(model, tokenizer, [example.question for example in examples], shown)  # (T, d) each
    # the state of a gold answer is that of its last token: where what follows it is predicted
    golds = states(model, tokenizer, [[example.answer] for example in examples], [[END]] * QUESTIONS)  # (1, d) each
    critical = np.isin(np.arange(len(shown[0])), examples[0].critical)  # (T,)
    found = []
    for sigma in BANDWIDTHS:
        how: dict[str, Any] = {"num_features": 16, "features": "quadrature", "sigma": sigma}
        areas = [auroc(coordinate_scores(x, gold[-1], **how).numpy(), critical) for x, gold in zip(hidden, golds)]
        found.append(f"{np.mean(areas):.2f}")
    medians = [float(median_bandwidth(place.reshape(-1, 1))) for place in torch.stack(hidden).unbind(1)]  # (Q, d) each
    places = " ".join(f"{median:.1f}{'*' if decides else ''}" for median, decides in zip(medians, critical))
    return [name, *found], f"{name}, by place: {places}"


def of_runs(folders: Sequence[Path], name: str) -> str:
    """Two tables, over all the runs."""
    world = WORLDS[name]
    example = world.draw(random.Random(0), world.knobs)
    length = len(example.demonstration) + 1
    critical = np.isin(np.arange(length), example.critical)  # (T,)
    by_step, selected, rewards = defaultdict(list), defaultdict(list), defaultdict(list)
    for path in sorted(path for folder in folders for path in folder.glob("rollouts/*.parquet")):
        rows = pyarrow.parquet.read_table(path, columns=["mi", "used", "mask", "answer", "reward"]).to_pylist()
        by_step[path.stem] += [row for row in rows if row["used"] and len(row["mi"]) == length]
    steps = []
    for number, (step, rows) in enumerate(sorted(by_step.items())):
        masks = np.array([row["mask"] for row in rows], dtype=float)  # (n, T)
        area = np.mean([auroc(np.array(row["mi"], dtype=float), critical) for row in rows])
        steps.append([step, str(len(rows)), f"{area:.2f}", f"{masks[:, critical].sum() / masks.sum():.2f}"])
        for row in rows:
            selected[row["answer"]].append(row["mask"][example.critical[-1]])
            if 3 * number >= 2 * len(by_step):
                rewards[row["answer"]].append(row["reward"])
    golds = [[gold, f"{np.mean(of):.2f}", f"{np.mean(rewards[gold]):.2f}"] for gold, of in sorted(selected.items())]
    return "\n".join(
        [
            markdown(["", "rollouts", "AUROC", "critical among selected"], steps),
            markdown(["gold answer", "last critical token selected", "reward, last third of the steps"], golds),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="+", choices=sorted(WORLDS), metavar="WORLD", help=", ".join(sorted(WORLDS)))
    parser.add_argument("--run", nargs="+", type=Path, metavar="FOLDER", help="runs on the one world that is named")
    options = parser.parse_args()
    if options.run:
        if len(options.worlds) > 1:
            parser.error("--run is of one world")
        print(of_runs(options.run, options.worlds[0]))
        return 0
    rows, places = zip(*map(at_base_policy, options.worlds))
    print(markdown(["bandwidth", *map(str, BANDWIDTHS)], rows))
    print(*places, "* what decides", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
