"""How well the mutual information finds the tokens that decide, by its bandwidth:  python bench/bandwidth.py chain fork

Of demonstrations of a bed at its base policy (python -m aipo.beds makes it): AUROC of the coordinate scores for the
critical tokens, mean within a demonstration, and the median bandwidth where each token is predicted. --run FOLDER reads
a training run on the bed instead, step by step: the AUROC of its scores, and the share of its mask that is critical;
and by gold answer: how often the last critical token was selected, and the reward. All rollouts must have been
recorded (tracking.rollouts_per_step).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aipo.beds.worlds import WORLDS
from aipo.credit.table import auroc
from aipo.evaluation.results import markdown
from aipo.layout import micro_batches
from aipo.mi import Sigma, coordinate_scores, median_bandwidth
from aipo.policy import Policy

BEDS = Path(__file__).resolve().parents[1] / "data" / "beds"
BANDWIDTHS: list[Sigma] = [0.75, 2.0, 5.0, 8.0, 12.0, 20.0, "median"]


@torch.no_grad()
def at_base_policy(bed: str, questions: int) -> tuple[list[str], str]:
    """A row of the table, and the median bandwidths by place."""
    model = AutoModelForCausalLM.from_pretrained(BEDS / bed / "model", dtype=torch.float32).eval()
    number = AutoTokenizer.from_pretrained(BEDS / bed / "model").get_vocab()
    world, draw = WORLDS[bed.partition("-")[0]], random.Random(9)
    examples = [world.draw(draw, world.knobs) for _ in range(questions)]
    words = [[*example.demonstration, "<end>"] for example in examples]
    # the state of a gold answer's own last token is the one that predicts what follows it
    prompts = [[number[word] for word in each.question] for each in examples] + [
        [number[each.answer]] for each in examples
    ]
    completions = [[number[word] for word in each] for each in words] + [[number["<end>"]] for _ in examples]
    (micro,) = micro_batches(prompts, completions, budget=sys.maxsize, packing=False)
    parts = Policy(model, temperature=1.0)(micro)["states"].split(micro.lengths.tolist())  # (t, d) each
    states = dict(zip(micro.rows.tolist(), parts))
    critical = np.isin(np.arange(len(words[0])), examples[0].critical)  # (T,)
    found = []
    for sigma in BANDWIDTHS:
        scores = [
            coordinate_scores(states[i], states[questions + i][-1], num_features=16, sigma=sigma, features="quadrature")
            for i in range(questions)
        ]
        found.append(f"{np.mean([auroc(each.numpy(), critical) for each in scores]):.2f}")
    together = torch.stack([states[i] for i in range(questions)])  # (Q, T, d)
    medians = [float(median_bandwidth(at.reshape(-1, 1))) for at in together.unbind(1)]
    return [bed, *found], f"{bed}, by place: " + " ".join(
        f"{median:.1f}{'*' if decides else ''}" for median, decides in zip(medians, critical)
    )


def of_run(folder: Path, bed: str) -> str:
    world = WORLDS[bed.partition("-")[0]]
    example = world.draw(random.Random(0), world.knobs)
    length = len(example.demonstration) + 1
    critical = np.isin(np.arange(length), example.critical)  # (T,)
    steps, golds = [], defaultdict[str, list[tuple[bool, float]]](list)
    for path in sorted(folder.glob("rollouts/*.parquet")):
        table = pyarrow.parquet.read_table(path, columns=["mi", "used", "mask", "answer", "reward"]).to_pylist()
        whole = [row for row in table if row["used"] and len(row["mi"]) == length]
        areas = [auroc(np.array(row["mi"], dtype=float), critical) for row in whole]
        masks = np.array([row["mask"] for row in whole], dtype=float)  # (n, T)
        share = masks[:, critical].sum() / masks.sum()
        steps.append([path.stem, str(len(whole)), f"{np.mean(areas):.2f}", f"{share:.2f}"])
        for row in whole:
            golds[row["answer"]].append((row["mask"][example.critical[-1]], row["reward"]))
    rows = [
        [gold, str(len(seen)), *(f"{each:.2f}" for each in np.mean(seen, 0))] for gold, seen in sorted(golds.items())
    ]
    by_gold = markdown(["gold answer", "rollouts", "last of the critical tokens selected", "reward"], rows)
    return markdown(["", "rollouts", "AUROC", "critical among selected"], steps) + "\n" + by_gold


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beds", nargs="+", metavar="BED", help="folders of data/beds")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--run", type=Path, help="a run on the one bed that is named")
    options = parser.parse_args()
    if options.run:
        print(of_run(options.run, options.beds[0]))
        return 0
    rows, places = zip(*(at_base_policy(bed, options.questions) for bed in options.beds))
    print(markdown(["bandwidth", *map(str, BANDWIDTHS)], rows))
    print(*places, "* what decides", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
