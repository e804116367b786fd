"""Which tokens matter, measured:  python -m aipo.credit --config CONFIG [--model MODEL] [--benchmarks A,B] [key=value]

For rollouts of a frozen model: the value of their prefixes by continuations, the change of value of each stretch of
tokens, every signal at the same tokens, and a table of how well each signal finds those that change it. Questions that
are done are kept in the folder, and the same command goes on with the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aipo import distributed
from aipo.config import Config
from aipo.credit.frozen import asked_signals, build, command, configured, prepare
from aipo.credit.plot import plot
from aipo.credit.signals import all_signals, named
from aipo.credit.table import WRONG, Credit, table, twins
from aipo.credit.values import Valued, by_chance, changes, enough_continuations, value_prefixes
from aipo.errors import UserError, exit_code
from aipo.evaluation.benchmarks import load_benchmarks
from aipo.inputs import Inputs, check_inputs
from aipo.model.precision import choose
from aipo.passes import Passes
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
    parser.add_argument("--questions", type=int, default=16, help="that are right and wrong both (16)")
    parser.add_argument("--samples", type=int, default=2, help="rollouts a question (2)")
    parser.add_argument("--continuations", type=int, default=16, help="of each prefix (16)")
    parser.add_argument("--stride", type=int, default=1, help="tokens between prefixes (1)")
    return parser.parse_intermixed_args(arguments)


@exit_code
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    for name in ("questions", "samples", "continuations", "stride"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: {getattr(options, name)} is below 1")
    enough_continuations(options.continuations)
    config = configured(options)
    folder = Path(options.out or Path("runs/credit") / config.name)
    return distributed.launch(lambda device: run(config, options, folder, device))


def run(config: Config, options: argparse.Namespace, folder: Path, device: torch.device) -> int:
    precision = choose(config.model.dtype, device.type)
    config = precision.settle(config)
    inputs = check_inputs(config, world=1)
    pool, only = candidates(inputs, options), asked_signals(options)
    named(config, pool, only)
    asked = {name: getattr(options, name) for name in ("benchmarks", "samples", "continuations", "stride")}
    prepare(folder, inputs, **asked)  # without the number of questions: more, or fewer, may be asked for later
    with Progress() as progress:
        for line in precision.lines:
            progress.say(line)
        collector, sharded = build(config, inputs, device)
        with closing(collector.engine), closing(collector.rewarder):
            drawn = draw(config, collector, pool, options, folder, progress)
            mixed = [problem for problem in pool if problem.id in drawn and drawn[problem.id].mixed]
            problems = mixed[: options.questions]
            check_golds(problems, named(config, problems, only))
            valued = values(config, collector, problems, drawn, options, folder, progress)
        encode = inputs.prompter.encode
        rollouts = Rollouts.joined([valued[p.id].rollouts(p, encode(p.question, p.origin)) for p in problems])
        frame, credit = rows(problems, valued, options.continuations, inputs.prompter)
        check(credit, options.continuations)
        signals = {"standard error": credit.error}  # as a control: where the noise is, some exceed it by chance
        makers = all_signals(Passes(config, sharded, inputs.prompter, device), problems, rollouts, only)
        with progress.task("signals", len(makers)) as task:
            for name, make in makers.items():
                signals[name] = stretches(make(), frame)
                task.advance()
        progress.say("tables: intervals over questions")
    write_parquet(folder / "tokens.parquet", frame | signals)
    text = summary(config, options, drawn, credit, frame, problems) + table(signals, credit)
    if any(name.endswith(WRONG) for name in signals):
        text += f"\nBeside another question's gold, the wrong gold: AUROC.\n\n{twins(signals, credit)}"
    (folder / "credit.md").write_text(text, encoding="utf-8")
    plot(signals, credit, folder / "credit.png")
    print(f"{text}\nwritten to {folder}: tokens.parquet, credit.md, credit.png")
    return 0


def candidates(inputs: Inputs, options: argparse.Namespace) -> list[Problem]:
    """Questions of which rollouts may be drawn, in their order."""
    most = CANDIDATES * options.questions
    if options.benchmarks is None:
        return inputs.held_out[:most]
    benchmarks = load_benchmarks(options.benchmarks.split(","), limit=most)
    turns = zip_longest(*(each.problems for each in benchmarks))  # so that every benchmark has its share
    kept, _ = inputs.prompter.filter([problem for turn in turns for problem in turn if problem is not None])
    return kept[:most]


def draw(
    config: Config,
    collector: Collector,
    pool: Sequence[Problem],
    options: argparse.Namespace,
    folder: Path,
    progress: Progress,
) -> dict[str, Valued]:
    """Rollouts of questions until enough of these are mixed; those of an earlier start are read.

    Where all rollouts are right, or all wrong, hardly a token changes the value, and none of the continuations that
    say so would tell one signal from another. UserError if no question is mixed.
    """
    asked = {problem.id for problem in pool}  # more may lie there, of a start that asked for more
    drawn = {
        row["question"]: Valued.of(row) for row in read_jsonl(folder / "rollouts.jsonl") if row["question"] in asked
    }
    sampling, wanted, n = Sampling.of(config.rollout), options.questions, options.samples
    mixed = sum(each.mixed for each in drawn.values())
    with progress.task("mixed questions", wanted) as task, closing(JsonlLog(folder / "rollouts.jsonl")) as log:
        task.advance(min(mixed, wanted))
        while mixed < wanted and (left := [problem for problem in pool if problem.id not in drawn]):
            batch = left[: 2 * wanted]
            rollouts = collector.collect(batch, sampling, samples=n, stream="credit")
            collector.judge(rollouts)
            for q, problem in enumerate(batch):
                drawn[problem.id] = Valued.drawn(rollouts.take(rollouts.rows_of([q])))
                log.append(drawn[problem.id].row())
            before, mixed = mixed, sum(each.mixed for each in drawn.values())
            task.advance(min(mixed, wanted) - min(before, wanted))
    if not mixed:
        judged = verdicts(drawn)
        if not judged:
            raise UserError(
                f"no rollout of {len(drawn)} questions has a verdict within reward.timeout_s "
                f"({config.reward.timeout_s:g}): raise it"
            )
        accuracy = sum(judged) / len(judged)
        if accuracy in (0, 1):
            raise UserError(
                f"the model is right in {accuracy:.0%} of {len(judged)} rollouts: every prefix has the same value. "
                f"Take {'easier' if accuracy == 0 else 'harder'} questions (--benchmarks) or another --model"
            )
        raise UserError(
            f"none of {len(drawn)} questions has both right and wrong rollouts (accuracy {accuracy:.0%}): raise "
            f"--samples ({n}), or take other questions (--benchmarks)"
        )
    if mixed < wanted:
        progress.say(
            f"{mixed} of the {len(drawn)} questions there are have both right and wrong rollouts, and --questions asks "
            f"for {wanted}: going on with those (more --samples would find more)"
        )
    return drawn


def verdicts(drawn: dict[str, Valued]) -> list[float]:
    """Of all rollouts that have one: 1 right, 0 wrong."""
    return [right for each in drawn.values() for right in each.judged if right == right]


def check_golds(problems: Sequence[Problem], signals: Sequence[str]) -> None:
    """UserError if a signal wants the gold of another answer, and there is one answer."""
    wanted = [name for name in signals if name.endswith(WRONG)]
    if wanted and len({problem.answer for problem in problems}) < 2:
        raise UserError(
            f"the questions with both right and wrong rollouts, {len(problems)}, have one answer, and '{wanted[0]}' "
            f"needs another: raise --questions, or name --signals without '{WRONG.strip()}'"
        )


def values(
    config: Config,
    collector: Collector,
    problems: Sequence[Problem],
    drawn: dict[str, Valued],
    options: argparse.Namespace,
    folder: Path,
    progress: Progress,
) -> dict[str, Valued]:
    """Of every prefix of the rollouts drawn; questions of an earlier start are read."""
    sampling = Sampling.of(config.rollout)
    done = {row["question"]: Valued.of(row) for row in read_jsonl(folder / "values.jsonl")}
    with progress.task("values", len(problems)) as task, closing(JsonlLog(folder / "values.jsonl")) as log:
        task.advance(sum(problem.id in done for problem in problems))
        for problem in problems:
            if problem.id in done:
                continue
            rollouts = drawn[problem.id].rollouts(problem, collector.prompter.encode(problem.question, problem.origin))
            done[problem.id] = value_prefixes(
                collector, rollouts, sampling, continuations=options.continuations, stride=options.stride
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
            chance = by_chance(torch.tensor(value), continuations)  # (n,)
            for i in range(len(cuts) - 1):
                if delta[i] != delta[i]:
                    continue
                ids = [] if problem.protected else completion.token_ids[cuts[i] : cuts[i + 1]]
                entry: tuple[Any, ...] = (problem.id, sample, cuts[i], cuts[i + 1], ids, prompter.decode(ids))
                entry += (value[i], value[i + 1])
                entry += (float(delta[i]), float(error[i]), float(chance[i]), own.correct[sample], rollout, q)
                for name, cell in zip(COLUMNS, entry):
                    columns[name].append(cell)
            rollout += 1
    numbers = {name: np.array(columns[name]) for name in ("delta", "error", "rollout", "number")}
    return columns, Credit(numbers["delta"], numbers["error"], numbers["rollout"], numbers["number"])


CANDIDATES = 8  # questions of which rollouts may be drawn for each that is wanted
COLUMNS: tuple[str, ...] = ("question", "sample", "start", "end", "token_ids", "text", "value_before", "value_after")
COLUMNS += ("delta", "error", "chance", "correct", "rollout", "number")


def check(credit: Credit, continuations: int) -> None:
    if not len(credit.delta):
        raise UserError("no rollout's prefixes have values: no answer of theirs had a verdict (reward.timeout_s)")
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


def summary(
    config: Config,
    options: argparse.Namespace,
    drawn: dict[str, Valued],
    credit: Credit,
    frame: dict[str, Any],
    problems: Sequence[Problem],
) -> str:
    decides = credit.decides
    judged = verdicts(drawn)
    return (
        f"# Token credit of {config.model.path}\n\n"
        f"{len(problems)} questions with both right and wrong rollouts, {options.samples} of each, among "
        f"{len(drawn)} questions that are right in {sum(judged) / len(judged):.0%}. Prefixes "
        f"{options.stride} token{'s' * (options.stride > 1)} apart, {options.continuations} continuations of each. "
        f"{int(decides.sum())} of {len(decides)} stretches ({decides.mean():.1%}) "
        f"change the value by more than twice their standard error (median {np.median(credit.error):.3f}); if none did "
        f"but the last of each, {sum(frame['chance']):.0f} would seem to. They hold "
        f"{np.abs(credit.delta[decides]).sum() / np.abs(credit.delta).sum():.0%} of the sum of |dV|. In brackets: "
        "95 % intervals, bootstrapped over questions.\n\n"
    )
