"""The pass before training that labels every question with its number of information peaks (Alg. 1, lines 1-15).

Long on a large data set, so it is sharded over ranks, appended to a file block by block, continued where it was
killed, and reused by every run with the same model, data and settings.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from math import ceil, floor
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from aipo import distributed
from aipo.config.sections import CurriculumConfig, MaskConfig
from aipo.curriculum import peak_label
from aipo.passes import Passes
from aipo.problems.datasets import Problem
from aipo.record.checkpoints import digest
from aipo.record.jsonl import JsonlLog, read_jsonl
from aipo.record.progress import Progress
from aipo.record.tracker import versions
from aipo.rollout.base import Sampling
from aipo.rollout.collect import Collector
from aipo.rollouts import Rollouts
from aipo.selection import Selection, TokenSelector

Label = Callable[[Sequence[Problem]], dict[str, float]]
"""N_peak of each of this rank's questions of a block, which may be none; a collective"""

DEPENDS_ON = (
    "model.",
    "data.",
    "mi.",
    "seed",
    "weights of model.path",
    "train_fingerprint",
    "mask.kappa_start",
    "mask.statistic",
    "mask.tau",
    "curriculum.bucket_by",
    "curriculum.probe_tokens",
    "rollout.engine",
    "rollout.max_tokens",
    "rollout.temperature",
    "rollout.top_",
)
"""Keys of a run's identity, by their beginnings; ``data.train`` and the weights are among its facts"""
LABELLED_TOGETHER = ("world_size", "optim.micro_tokens", "optim.packing", "optim.share_prompts")
"""... and what more decides which rollouts scores see that look beyond one sequence"""


LABELLED_BY = (
    *("curriculum.py", "labelling.py", "layout.py", "mask.py", "mi*.py", "model/*.py", "passes.py", "policy.py"),
    *("problems/prompts.py", "rollout/*.py", "scorer.py", "selection.py"),
)
"""Files of this package whose change makes other labels"""


def peaks(rollouts: Rollouts, scores: Tensor, config: CurriculumConfig, mask: MaskConfig) -> dict[str, float]:
    """Mean N_peak of each question's rollouts from their scores (B, T), of those that were scored."""
    found = defaultdict(list)
    for row, length in enumerate(rollouts.lengths.tolist()):
        own = scores[row, :length]  # (t,)
        if own.isfinite().all():
            label = peak_label(own, mask, config.bucket_by, config.probe_tokens)
            found[rollouts.question_of(row).id].append(label)
    return {question: sum(labels) / len(labels) for question, labels in found.items()}


def label(
    problems: Sequence[Problem], collector: Collector, passes: Passes, selector: TokenSelector
) -> dict[str, float]:
    """N_peak of some questions under the present policy at kappa_start; a collective.

    Completions are cut where no peak is counted any more, and running statistics stay as they were: a run that
    labels trains exactly as one that finds its labels made.
    """
    config, clean = passes.config, selector.state_dict()
    kappa, sampling = config.mask.kappa_start, Sampling.of(config.rollout)
    sampling = replace(sampling, max_tokens=min(sampling.max_tokens, config.curriculum.probe_tokens))
    passes.wake(collector.engine)
    rollouts = collector.collect(problems, sampling, samples=1, stream="label", submit=False)  # scores alone count
    collector.engine.sleep()
    selection = Selection(selector, rollouts, passes.gold_states(problems), kappa=kappa, step=0)
    selection.score_all(passes.batches_of(rollouts), passes.states)
    selector.load_state_dict(clean)
    return peaks(rollouts, selection.scores, config.curriculum, config.mask)


def label_folder(cache: Path, **facts: object) -> Path:
    """Where labels made from exactly these facts lie."""
    return cache / "labels" / digest(facts)


def label_code(package: Path = Path(__file__).parent) -> str:
    """The code and the libraries that labels come of: a run must not depend on what an older one left behind."""
    files = sorted(path for name in LABELLED_BY for path in package.glob(name))
    code = [(path.relative_to(package).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    return digest([code, versions()])


def label_questions(
    problems: Sequence[Problem], label: Label, folder: Path, *, block: int, progress: Progress
) -> dict[str, float]:
    """N_peak by question id, the same on every rank; ``block`` questions a rank are labelled and saved at a time.

    Runs that share ``folder`` label one after the other: the second waits, and finds the labels of the first.
    """
    if distributed.rank() > 0:
        return _label(problems, label, folder, block, progress)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say("another run makes the labels that this one needs: waiting for it")
        lock.acquire()
    try:
        return _label(problems, label, folder, block, progress)
    finally:
        lock.release()


def _label(problems: Sequence[Problem], label: Label, folder: Path, block: int, progress: Progress) -> dict[str, float]:
    # one rank reads for all: they may see a shared folder at different moments
    known = distributed.gather_objects(read_labels(folder) if distributed.rank() == 0 else {})[0]
    rank, world = distributed.rank(), distributed.world_size()
    # the same blocks after a kill: scores may depend on what is scored together
    blocks = [problems[start : start + block * world] for start in range(0, len(problems), block * world)]
    missing = [together for together in blocks if any(problem.id not in known for problem in together)]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)  # ranks do not wait for the first to have made it
        file = JsonlLog(folder / f"rank-{rank}.jsonl")
        with progress.task("labelling", len(problems)) as task, closing(file):
            task.advance(len(problems) - sum(map(len, missing)))
            for together in missing:
                labels = label(together[rank::world])
                file.append(*({"id": question, "n_peak": peak} for question, peak in labels.items()))
                task.advance(len(together))
                for part in distributed.gather_objects(labels):
                    known |= part
    return {problem.id: known[problem.id] for problem in problems}


def histogram(labels: Sequence[float], bins: int = 10) -> list[str]:
    """How many questions have how many peaks, a line for each of at most ``bins`` whole-numbered intervals."""
    low, high = floor(min(labels)), floor(max(labels))
    width = (high - low) // bins + 1
    edges = range(low, high + 1, width)
    counts = [sum(edge <= label < edge + width for label in labels) for edge in edges]
    spans = [str(edge) if width == 1 else f"{edge}-{edge + width - 1}" for edge in edges]
    longest, digits = max(map(len, spans)), len(str(max(counts)))
    return [
        f"  {span:>{longest}} {count:{digits}} {'#' * ceil(40 * count / max(counts))}"
        for span, count in zip(spans, counts)
    ]


def read_labels(folder: Path) -> dict[str, float]:
    """What all ranks' files say; a line torn by a kill is passed over, and its question labelled again."""
    rows = [row for file in sorted(folder.glob("rank-*.jsonl")) for row in read_jsonl(file)]
    return {row["id"]: row["n_peak"] for row in rows}
