"""Accuracy: on held-out problems during training, and on benchmarks with completions that survive a kill."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aipo import distributed
from aipo.config import Config
from aipo.errors import UserError
from aipo.evaluation.benchmarks import Item
from aipo.metrics import Accuracy, accuracy_summary
from aipo.passes import Passes
from aipo.problems.datasets import Problem
from aipo.problems.prompts import Prompter
from aipo.record.checkpoints import write_atomically
from aipo.record.jsonl import JsonlLog, read_jsonl, to_line
from aipo.record.progress import Progress
from aipo.rollout.base import Completion, Request, RolloutEngine, Sampling
from aipo.rollout.collect import Collector
from aipo.verify import Verdict, Verifier, after_thinking, extract_answer

Row = dict[str, Any]  # one completion, as it stands in a file
Answers = dict[str, list[bool]]  # question id -> whether each sample is right

BLOCK = 4096
"""Completions that the engine is asked for at a time: until the last of them is drawn it holds the tokens and
log-probabilities of all, 72 bytes a token. vLLM draws a few hundred together, so little is lost where a block ends."""


@dataclass(frozen=True)
class Watched:
    """A set that is measured every ``every`` steps with ``samples`` a question, and steers nothing."""

    problems: Sequence[Problem]
    samples: int
    every: int


class Validator:
    """Accuracy during training: on held-out questions, which steer it, and on sets that are only watched.

    Args:
        watched: the latter by their names.
    """

    def __init__(
        self,
        collector: Collector,
        passes: Passes,
        progress: Progress,
        config: Config,
        held_out: Sequence[Problem],
        watched: Mapping[str, Watched],
    ) -> None:
        self.answers: list[Row] = []  # of the last validation, by question
        self.collector, self.passes, self.progress, self.config = collector, passes, progress, config.validation
        self.max_tokens, self.held_out, self.watched = config.rollout.max_tokens, held_out, watched

    def validate(self) -> tuple[Accuracy, dict[str, float]]:
        """Accuracy on the held-out questions, and metrics for the log."""
        accuracy, metrics, answers = self._measure("validation", self.held_out, self.config.samples)
        self.answers = [
            {"id": p.id, "question": None if p.protected else p.question, "right": answers[p.id]} for p in self.held_out
        ]
        return accuracy, metrics

    def watch(self, step: int, *, last: bool) -> dict[str, float]:
        """Metrics of the watched sets where they are due. Nothing of them stays: not even in the engine's cache."""
        due = {name: each for name, each in self.watched.items() if last or step % each.every == 0}
        if not due:
            return {}
        metrics: dict[str, float] = {}
        for name, each in due.items():
            metrics |= self._measure(f"watch/{name}", each.problems, each.samples)[1]
        self.collector.engine.sleep()  # new weights beside its cache may not fit
        self.collector.engine.sync(self.passes.sharded.full_parameters())
        return metrics

    def _measure(
        self, name: str, problems: Sequence[Problem], samples: int
    ) -> tuple[Accuracy, dict[str, float], Answers]:
        """avg@k over all ranks with its 95 % interval, the same on every rank, metrics for the log, and what is right
        of each question.

        The random streams, by ``name``, are the same each time: differences between two validations come from the
        weights alone. An answer without a verdict counts as wrong here, and its share is in the log: nothing is learned
        from it.
        """
        config, collector, world = self.config, self.collector, distributed.world_size()
        self.passes.wake(collector.engine)
        sampling = Sampling(self.max_tokens, config.temperature, config.top_p, config.top_k)
        mine = problems[distributed.rank() :: world]
        with self.progress.task(name, len(problems) * samples) as task:
            rollouts = collector.collect(
                mine, sampling, samples=samples, stream=name, on_done=lambda: task.advance(world)
            )
            collector.judge(rollouts)
            right = rollouts.correct.reshape(-1, samples).tolist()  # (Q, samples)
            each = [rollouts.lengths, rollouts.truncated, rollouts.rewards.isnan()]  # (B,) each
            sums = torch.stack([values.double().sum() for values in each])  # (3,)
            gathered = distributed.gather_objects(([problem.id for problem in mine], right, sums))
        by_id = {key: own for ids, rows, _ in gathered for key, own in zip(ids, rows)}
        answers = {problem.id: by_id[problem.id] for problem in problems}
        accuracy = accuracy_summary(list(answers.values()))
        length, truncated, no_verdict = (sum(part[-1] for part in gathered) / accuracy.samples).tolist()
        metrics = {
            f"{name}/accuracy": accuracy.value,
            f"{name}/accuracy_low": accuracy.low,
            f"{name}/accuracy_high": accuracy.high,
            f"{name}/length_mean": length,
            f"{name}/truncated": truncated,
            f"{name}/no_verdict": no_verdict,
        }
        return accuracy, metrics, answers


class CompletionFiles:
    """The completions of an evaluation: ``rank-<r>/<benchmark>.jsonl`` while ranks write, then ``<benchmark>.jsonl``.

    A row is written whole and flushed as soon as its answer is judged. A process killed in the middle of one leaves a
    line without an end, which is dropped on the next start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, JsonlLog] = {}

    def read(self, benchmark: str) -> list[Row]:
        """All rows there are of one benchmark, in order of problem and sample; what is there twice, once."""
        rows: dict[tuple[str, int], Row] = {}
        for path in self._files(benchmark):
            for row in read_jsonl(path):
                rows[row["id"], row["sample"]] = row
        return [rows[key] for key in sorted(rows)]

    def append(self, row: Row) -> None:
        """Add a row of this rank."""
        name = row["benchmark"]
        if name not in self._open:
            path = self.folder / f"rank-{distributed.rank()}" / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            self._open[name] = JsonlLog(path, durable=False)
        self._open[name].append(row)

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def merge(self, benchmark: str) -> list[Row]:
        """One file instead of one a rank; returns its rows. Called by one rank, when all have closed theirs."""
        rows, whole = self.read(benchmark), self.folder / f"{benchmark}.jsonl"
        parts = [path for path in self._files(benchmark) if path != whole]
        if parts:
            write_atomically(whole, "".join(map(to_line, rows)))
            for path in parts:
                path.unlink()
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()
        return rows

    def _files(self, benchmark: str) -> list[Path]:
        parts = [folder / f"{benchmark}.jsonl" for folder in sorted(self.folder.glob("rank-*"))]
        return [path for path in (self.folder / f"{benchmark}.jsonl", *parts) if path.is_file()]


def pending(items: Sequence[Item], files: CompletionFiles) -> list[int]:
    """Positions of this rank's share of the items that are not there yet: the same number on each rank up to one."""
    names = {item.benchmark for item in items}
    done = {(name, row["id"], row["sample"]) for name in names for row in files.read(name)}
    missing = [i for i, item in enumerate(items) if item.key not in done]
    return missing[distributed.rank() :: distributed.world_size()]


def requests_for(items: Sequence[Item], prompters: dict[str, Prompter], *, room: int) -> list[Request]:
    """Prompts of all items; ``prompters`` by kind of problem. UserError for one longer than ``room`` tokens."""
    prompts: dict[tuple[str, str], list[int]] = {}  # the samples of a question mostly share theirs
    requests = []
    for item in items:
        problem = item.problem
        key = (problem.kind, problem.question)
        if key not in prompts:
            prompts[key] = prompters[problem.kind].encode(problem.question)
        if len(prompts[key]) > room:
            raise UserError(
                f"{item.benchmark}: the prompt of question {problem.id} has {len(prompts[key])} tokens, but the "
                f"model's context leaves {room} beside the completion: lower --max-tokens"
            )
        requests.append(Request(prompts[key], item.seed))
    return requests


def complete(
    items: Sequence[Item],
    requests: Sequence[Request],
    *,
    engine: RolloutEngine,
    prompters: dict[str, Prompter],
    verifier: Verifier,
    sampling: Sampling,
    files: CompletionFiles,
    lenient: bool = False,
    on_done: Callable[[], None] | None = None,
) -> None:
    """Draw, judge and write every item, in blocks across benchmarks: one waits for another only where a block ends.

    Args:
        requests: of :func:`requests_for`, for the same items.
        lenient: an answer may be the last expression of a completion that has no box (see ``aipo.verify.pool``).
        on_done: called after every completion.
    """
    judged: deque[tuple[Row, Future[Verdict]]] = deque()

    def write_judged(wait: bool) -> None:
        while judged and (wait or judged[0][1].done()):
            row, verdict = judged.popleft()
            row["verdict"] = verdict.result().value
            files.append(row | {"correct": row["verdict"] == Verdict.CORRECT.value})

    def finished(start: int, i: int, completion: Completion) -> None:
        item = items[start + i]
        problem = item.problem
        text = prompters[problem.kind].decode(completion.token_ids)
        row: Row = {
            "benchmark": item.benchmark,
            "id": problem.id,
            "sample": item.sample,
            "seed": item.seed,
            "gold": problem.answer,
            "answer": extract_answer(text, problem.kind, lenient=lenient),
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "thinking_closed": after_thinking(text) is not None,
        }
        if problem.options:  # the same letter means another option in each sample
            row["option"] = item.option_of(row["answer"])
        if not item.text_stays_here:
            row |= {"question": problem.question, "completion": text}
        judged.append((row, verifier.submit(problem.answer, text, problem.kind, lenient=lenient)))
        write_judged(wait=False)
        if on_done is not None:
            on_done()

    try:
        for start in range(0, len(requests), BLOCK):
            engine.generate(requests[start : start + BLOCK], sampling, on_done=partial(finished, start))
        write_judged(wait=True)
    finally:
        files.close()
