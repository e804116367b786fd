"""Which tokens matter, measured:  python -m aipo.credit --config CONFIG [--model MODEL] [--benchmarks A,B] [key=value]

For rollouts of a frozen model: the value of their prefixes by continuations, the change of value of each stretch of
tokens, every signal at the same tokens, and a table of how well each signal finds those that change it. Questions that
are done are kept in the folder, and the same command goes on with the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aipo import distributed
from aipo.config import Config
from aipo.credit.frozen import build, command, configured, prepare
from aipo.credit.plot import plot
from aipo.credit.signals import all_signals
from aipo.credit.table import Credit, table
from aipo.credit.values import Valued, changes, enough_continuations, value_prefixes
from aipo.errors import UserError
from aipo.evaluation.benchmarks import load_benchmarks
from aipo.inputs import Inputs, check_inputs
from aipo.model.precision import choose
from aipo.problems.problem import Problem
from aipo.problems.prompts import Prompter
from aipo.record.jsonl import JsonlLog, read_jsonl
from aipo.record.progress import Progress
from aipo.rollout import Sampling
from aipo.rollout.collect import Collector
from aipo.rollouts import Rollouts


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command("aipo.credit", __doc__, "of a run: model, prompts, sampling, and the keys of mi")
    parser.add_argument("--benchmarks", help="by comma, as for evaluate.py (default: the held-out set of the config)")
    parser.add_argument("--questions", type=int, default=16, help="the first so many (16)")
    parser.add_argument("--samples", type=int, default=4, help="rollouts a question (4)")
    parser.add_argument("--continuations", type=int, default=32, help="of each prefix (32)")
    parser.add_argument("--stride", type=int, default=1, help="tokens between prefixes (1)")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        for name in ("questions", "samples", "continuations", "stride"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name}: {getattr(options, name)} is below 1")
        enough_continuations(options.continuations)
        config = configured(options)
        folder = Path(options.out or Path("runs/credit") / config.name)
        return distributed.launch(lambda device: run(config, options, folder, device))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(config: Config, options: argparse.Namespace, folder: Path, device: torch.device) -> int:
    precision = choose(config.model.dtype, device.type)
    config = precision.settle(config)
    inputs = check_inputs(config, world=1)
    problems = questions(inputs, options)
    asked = {name: getattr(options, name) for name in ("samples", "continuations", "stride")}
    prepare(folder, config, questions=[problem.id for problem in problems], **asked)
    with Progress() as progress:
        for line in precision.lines:
            progress.say(line)
        collector, sharded = build(config, inputs, device)
        with closing(collector.engine), closing(collector.rewarder):
            valued = values(config, collector, problems, options, folder, progress)
        rollouts = Rollouts.joined([valued[p.id].rollouts(p, inputs.prompter.encode(p.question)) for p in problems])
        frame, credit = rows(problems, valued, options.continuations, inputs.prompter)
        check(credit, options.continuations)
        signals: dict[str, np.ndarray[Any, Any]] = {}
        with progress.task("signals", len(frame["start"])) as task:
            for name, scores in all_signals(config, sharded, inputs.prompter, problems, rollouts, device):
                signals[name] = stretches(scores, frame)
            task.advance(len(frame["start"]))
    write_parquet(folder / "tokens.parquet", frame | signals)
    text = summary(config, options, credit, rollouts) + table(signals, credit)
    (folder / "credit.md").write_text(text)
    plot(signals, credit, folder / "credit.png")
    print(f"{text}\nwritten to {folder}: tokens.parquet, credit.md, credit.png")
    return 0


def questions(inputs: Inputs, options: argparse.Namespace) -> list[Problem]:
    if options.benchmarks is None:
        return inputs.held_out[: options.questions]
    benchmarks = load_benchmarks(options.benchmarks.split(","), limit=options.questions)
    kept, _ = inputs.prompter.filter([problem for each in benchmarks for problem in each.problems])
    return kept


def values(
    config: Config,
    collector: Collector,
    problems: Sequence[Problem],
    options: argparse.Namespace,
    folder: Path,
    progress: Progress,
) -> dict[str, Valued]:
    """Of every question; those of an earlier start are read. UserError if the model is always right or always wrong."""
    sampling = Sampling.of(config.rollout)
    done = {row["question"]: Valued.of(row) for row in read_jsonl(folder / "values.jsonl")}
    missing = [problem for problem in problems if problem.id not in done]
    drawn = collector.collect(missing, sampling, samples=options.samples, stream="credit") if missing else None
    if drawn is not None:
        collector.judge(drawn)
        right = [*(r for each in done.values() for r in each.correct), *drawn.correct.tolist()]
        n, accuracy = options.samples, sum(right) / len(right)
        if accuracy in (0, 1):
            raise UserError(
                f"the model is right in {accuracy:.0%} of {len(right)} rollouts: every prefix has the same value. Take "
                f"{'easier' if accuracy == 0 else 'harder'} questions (--benchmarks) or another --model"
            )
        mixed = [0 < sum(right[i : i + n]) < n for i in range(0, len(right), n)]
        if not any(mixed):
            raise UserError(
                f"none of {len(mixed)} questions has both right and wrong rollouts (accuracy {accuracy:.0%}): raise "
                f"--samples ({n}) or --questions"
            )
    with progress.task("values", len(problems)) as task, closing(JsonlLog(folder / "values.jsonl")) as log:
        task.advance(len(done))
        for q, problem in enumerate(missing):
            assert drawn is not None
            own = drawn.take(drawn.rows_of([q]))
            done[problem.id] = value_prefixes(
                collector, own, sampling, continuations=options.continuations, stride=options.stride
            )
            log.append(done[problem.id].row())
            task.advance()
    return done


def rows(
    problems: Sequence[Problem], valued: dict[str, Valued], continuations: int, prompter: Prompter
) -> tuple[dict[str, Any], Credit]:
    """Every stretch of tokens between two prefixes, as columns; one without a verdict is left out."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    rollout = 0
    for q, problem in enumerate(problems):
        own = valued[problem.id]
        for sample, (completion, cuts, value) in enumerate(zip(own.completions, own.cuts, own.values)):
            delta, error = changes(torch.tensor(value), continuations)  # (n,)
            for i in range(len(cuts) - 1):
                if delta[i] != delta[i]:
                    continue
                ids = [] if problem.protected else completion.token_ids[cuts[i] : cuts[i + 1]]
                entry: tuple[Any, ...] = (problem.id, sample, cuts[i], cuts[i + 1], ids, prompter.decode(ids))
                entry += (value[i], value[i + 1])
                entry += (float(delta[i]), float(error[i]), own.correct[sample], rollout, q)
                for name, cell in zip(COLUMNS, entry):
                    columns[name].append(cell)
            rollout += 1
    numbers = {name: np.array(columns[name]) for name in ("delta", "error", "rollout", "number")}
    return columns, Credit(numbers["delta"], numbers["error"], numbers["rollout"], numbers["number"])


COLUMNS: tuple[str, ...] = ("question", "sample", "start", "end", "token_ids", "text", "value_before", "value_after")
COLUMNS += ("delta", "error", "correct", "rollout", "number")


def check(credit: Credit, continuations: int) -> None:
    if not credit.decides.any():
        raise UserError(
            f"none of {len(credit.delta)} tokens changes the value by more than twice its standard error (the largest "
            f"change is {np.abs(credit.delta).max():.2f}, the median error {np.median(credit.error):.2f}): raise "
            f"--continuations ({continuations}) or --questions"
        )


def stretches(scores: torch.Tensor, frame: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Mean of (B, T) scores over each stretch; NaN where a token of it has none. (n,)"""
    values = scores.double().numpy()
    places = zip(frame["rollout"], frame["start"], frame["end"])
    return np.array([values[row, start:end].mean() for row, start, end in places])


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), temporary)
    temporary.replace(path)


def summary(config: Config, options: argparse.Namespace, credit: Credit, rollouts: Rollouts) -> str:
    decides = credit.decides
    return (
        f"# Token credit of {config.model.path}\n\n"
        f"{len(rollouts.problems)} questions, {options.samples} rollouts each, right in "
        f"{float(rollouts.correct.float().mean()):.0%}; {options.continuations} continuations of every prefix, "
        f"{options.stride} tokens apart. {int(decides.sum())} of {len(decides)} stretches ({decides.mean():.1%}) "
        f"change the value by more than twice their standard error (median {np.median(credit.error):.3f}); they hold "
        f"{np.abs(credit.delta[decides]).sum() / np.abs(credit.delta).sum():.0%} of the sum of |dV|. In brackets: "
        "95 % intervals, bootstrapped over questions.\n\n"
    )


if __name__ == "__main__":
    sys.exit(main())
