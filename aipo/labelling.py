"""The pass before training that labels every question with its number of information peaks (Alg. 1, lines 1-15).

Long on a large data set, so it is sharded over ranks, appended to a file question by question, continued where it was
killed, and reused by every run with the same model, data and settings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from aipo import distributed
from aipo.problems.datasets import Problem
from aipo.record.progress import Progress

Label = Callable[[Sequence[Problem]], dict[str, float]]
"""N_peak of each of this rank's questions of a block, which may be none; a collective"""


def label_folder(cache: Path, **facts: object) -> Path:
    """Where labels made from exactly these facts lie."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return cache / "labels" / hashlib.sha256(text.encode()).hexdigest()[:16]


def label_questions(
    problems: Sequence[Problem], label: Label, folder: Path, *, block: int, progress: Progress
) -> dict[str, float]:
    """N_peak by question id, the same on every rank; ``block`` questions a rank are labelled and saved at a time."""
    # one rank reads for all: they may see a shared folder at different moments
    known = distributed.gather_objects(read_labels(folder) if distributed.rank() == 0 else {})[0]
    missing = [problem for problem in problems if problem.id not in known]
    rank, world = distributed.rank(), distributed.world_size()
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with progress.task("labelling", len(problems)) as task, (folder / f"rank-{rank}.jsonl").open("a") as file:
            file.write("\n")  # ends a line that a kill tore
            task.advance(len(problems) - len(missing))
            for start in range(0, len(missing), block * world):
                together = missing[start : start + block * world]
                labels = label(together[rank::world])
                file.write("".join(json.dumps({"id": k, "n_peak": v}) + "\n" for k, v in labels.items()))
                file.flush()
                os.fsync(file.fileno())
                task.advance(len(together))
                for part in distributed.gather_objects(labels):
                    known |= part
    return {problem.id: known[problem.id] for problem in problems}


def read_labels(folder: Path) -> dict[str, float]:
    """What all ranks' files say; a line torn by a kill is passed over, and its question labelled again."""
    labels: dict[str, float] = {}
    for file in sorted(folder.glob("rank-*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # torn
                continue
            labels[row["id"]] = row["n_peak"]
    return labels
