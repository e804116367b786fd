"""How well the gradient on selected tokens points where a much larger batch's on all tokens does.

python -m aipo.credit.gradients --config CONFIG [--model MODEL] [key=value]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from aipo import distributed
from aipo.advantage import group_advantages
from aipo.config import Config
from aipo.credit.frozen import asked_signals, build, command, configured, prepare
from aipo.credit.signals import all_signals, named
from aipo.errors import UserError, exit_code
from aipo.evaluation.results import markdown
from aipo.inputs import check_inputs
from aipo.layout import token_grid
from aipo.mask import lowest
from aipo.metrics import bootstrap_interval
from aipo.model.precision import choose
from aipo.passes import Passes
from aipo.plan.flops import sizes, step_flops
from aipo.problems.problem import Problem
from aipo.record.jsonl import JsonlLog, read_jsonl
from aipo.record.progress import Progress
from aipo.rollout import Sampling
from aipo.rollouts import Rollouts
from aipo.sharding import trainable

Row = dict[str, Any]
ALL = "all tokens"
TIMES = 16  # the large batch, in small ones, at least


def gradient(passes: Passes, rollouts: Rollouts, mask: Tensor) -> Tensor:
    """Of sum m_t A log pi over a batch, in one vector (P,), fp32; mask (B, T) bool. Leaves no gradient behind."""
    sharded = passes.sharded
    advantages = group_advantages(rollouts.rewards, rollouts.group_size)[:, None].expand(mask.shape)  # (B, T)
    for micro in passes.batches_of(rollouts):
        chosen = micro.ragged_of(mask)  # (N,)
        logp = sharded.forward(micro, lambda _, chosen=chosen: chosen)["logp"]  # (K,)
        sharded.backward((logp * micro.ragged_of(advantages)[chosen]).sum())
    parameters = trainable(sharded.policy)
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return flat.float().cpu()


def top(scores: Tensor, lengths: Tensor, fraction: float) -> Tensor:
    """The round(fraction n) highest scores of every completion, at least one: (B, T), (B,) -> bool (B, T).

    Equal ones as drawn by a fixed seed: the first of them are the early ones, which is a signal of its own.
    """
    counted = token_grid(lengths, scores.shape[1]) & scores.isfinite()  # (B, T)
    order = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)).argsort(1)  # (B, T)
    count = (fraction * lengths).round().clamp(min=1).long()  # (B,)
    found = lowest(-scores.gather(1, order), counted.gather(1, order), count)  # (B, T)
    return torch.zeros_like(found).scatter(1, order, found) & counted


def cost(model: dict[str, int], rollouts: Rollouts, mask: Tensor) -> float:
    """FLOPs of the backward pass for the tokens of ``mask`` (B, T): nothing behind a rollout's last one is laid out."""
    place = torch.arange(1, mask.shape[1] + 1)  # (T,)
    ends = torch.where(mask, place, 0).amax(1).tolist()  # B
    rows = [len(prompt) + end for prompt, end in zip(rollouts.each_prompt, ends) if end]
    return step_flops(model, rows, sum(rows), int(mask.sum())) * 2 / 3


def measure_batch(
    passes: Passes,
    problems: Sequence[Problem],
    rollouts: Rollouts,
    truth: Tensor,
    budgets: Sequence[float],
    progress: Progress,
    *,
    wanted: Sequence[str],
    name: str,
) -> list[Row]:
    """Cosines of one small batch with the gradient ``truth`` (P,), a line for each signal and budget.

    Beside each: what share of the FLOPs of a backward pass for all tokens it needs, and what cosine all tokens of so
    many fewer questions have that those need as much, between whole questions in proportion. None if no question has
    both right and wrong rollouts, so that there is no gradient.
    """
    lengths = rollouts.lengths
    every = token_grid(lengths, int(lengths.max()))  # (B, T)
    model = sizes(passes.sharded.policy.model)
    whole, costs, cosines = cost(model, rollouts, every), [0.0], [0.0]
    own = torch.zeros_like(truth)  # (P,)
    for q in range(len(rollouts.problems)):
        part = rollouts.take(rollouts.rows_of([q]))
        mask = every[rollouts.rows_of([q])][:, : int(part.lengths.max())]  # (b, t)
        own += gradient(passes, part, mask)
        costs.append(costs[-1] + cost(model, part, mask) / whole)
        cosines.append(float(cosine_similarity(own, truth, dim=0)))
    if not own.any():
        return []
    found: list[Row] = [{"signal": ALL, "budget": 1.0, "cosine": cosines[-1], "cost": 1.0, "same_cost": cosines[-1]}]
    makers = all_signals(passes, problems, rollouts, wanted)
    with progress.task(name, len(makers)) as task:
        for signal, make in makers.items():
            scores = make()
            for budget, (label, sign) in product(budgets, ((signal, 1.0), (f"{signal}, lowest", -1.0))):
                mask = top(sign * scores, lengths, budget)
                cosine = float(cosine_similarity(gradient(passes, rollouts, mask), truth, dim=0))
                share = cost(model, rollouts, mask) / whole
                same = float(np.interp(share, costs, cosines))
                found.append({"signal": label, "budget": budget, "cosine": cosine, "cost": share, "same_cost": same})
            task.advance()
    return found


def interval(values: Sequence[float]) -> str:
    """Mean and its 95 % interval, bootstrapped over batches."""
    low, high = bootstrap_interval(values, 0, resamples=1000)
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


def tables(batches: Sequence[Sequence[Row]], budgets: Sequence[float]) -> str:
    """At equal tokens, and at equal cost; both best first at the second largest budget."""
    rows = [row for batch in batches for row in batch]
    middle = sorted(budgets)[max(len(budgets) - 2, 0)]

    def of(signal: str, budget: float) -> list[Row]:
        return [row for row in rows if row["signal"] == signal and row["budget"] in (budget, 1.0)]

    def mean(signal: str) -> float:
        return float(np.mean([row["cosine"] for row in of(signal, middle)]))

    tokens, costs = [], []
    for signal in sorted(dict.fromkeys(row["signal"] for row in rows), key=mean, reverse=True):
        own = [of(signal, budget) for budget in budgets]
        tokens.append([signal, *(interval([row["cosine"] for row in each]) for each in own)])
        less = [interval([row["cosine"] - row["same_cost"] for row in each]) for each in own]
        shares = [np.mean([row["cost"] for row in each]) for each in own]
        if signal != ALL:
            costs.append([signal, *(f"{share:.0%}: {each}" for share, each in zip(shares, less))])
    columns = ["signal", *(f"{budget:.0%} of tokens" for budget in budgets)]
    return (
        f"{markdown(columns, tokens)}\nAt equal cost: the share of the backward pass's FLOPs that the selection needs "
        "(up to the last selected token of each completion, and the head at the selected ones), and its cosine less "
        f"that of all tokens of so many fewer questions that they cost as much.\n\n{markdown(columns, costs)}"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = "of a run: model, training questions, sampling, keys of mi"
    parser = command("aipo.credit.gradients", __doc__, asked)
    parser.add_argument("--questions", type=int, default=8, help="of a small batch (8)")
    parser.add_argument("--times", type=int, default=TIMES, help=f"the large batch, in small ones ({TIMES})")
    parser.add_argument("--batches", type=int, default=8, help="small batches that are averaged (8)")
    parser.add_argument("--budgets", default="0.05,0.1,0.2,0.5", help="shares of a completion's tokens, by comma")
    return parser.parse_intermixed_args(arguments)


@exit_code
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.times < TIMES:
        raise UserError(f"--times: {options.times} is below {TIMES}: the large batch would be as noisy as a small one")
    config = configured(options)
    folder = Path(options.out or Path("runs/credit") / f"{config.name}-gradients")
    return distributed.launch(lambda device: run(config, options, folder, device))


def run(config: Config, options: argparse.Namespace, folder: Path, device: torch.device) -> int:
    config = choose(config.model.dtype, device.type).settle(config)
    inputs = check_inputs(config, world=1)
    small, budgets = options.questions, shares(options.budgets)
    named(config, inputs.problems, asked_signals(options))
    needed = small * (options.times + options.batches)
    if len(inputs.problems) < needed:
        raise UserError(
            f"data.train has {len(inputs.problems)} questions, and {needed} are needed (--questions x (--times + "
            "--batches)): lower one of them"
        )
    asked = {name: getattr(options, name) for name in ("questions", "times", "budgets", "signals")}
    prepare(folder, inputs, **asked)
    sampling, samples = Sampling.of(config.rollout), config.rollout.samples_per_question
    done = {row["batch"]: row["rows"] for row in read_jsonl(folder / "cosines.jsonl")}
    with Progress() as progress:
        collector, sharded = build(config, inputs, device)
        passes = Passes(config, sharded, inputs.prompter, device)

        def draw(name: str, start: int, count: int) -> Rollouts:
            with progress.task(name, count * samples) as task:
                problems = inputs.problems[start : start + count]
                rollouts = collector.collect(
                    problems, sampling, samples=samples, stream="gradients", on_done=task.advance
                )
                collector.judge(rollouts)
            return rollouts

        with closing(collector.engine), closing(collector.rewarder), closing(JsonlLog(folder / "cosines.jsonl")) as log:
            if (folder / "truth.pt").is_file():
                truth = torch.load(folder / "truth.pt")
            else:
                large = draw("large batch", 0, small * options.times)
                accuracy = float(large.correct.float().mean())
                every = token_grid(large.lengths, int(large.lengths.max()))  # (B, T)
                truth = gradient(passes, large, every)
                if not truth.any():
                    raise UserError(
                        f"none of {len(large.problems)} questions has both right and wrong rollouts (accuracy "
                        f"{accuracy:.0%} of {len(large.correct)}), so there is no gradient: raise "
                        f"rollout.samples_per_question ({samples}), or take other questions (data.train) or another "
                        "--model"
                    )
                torch.save(truth, folder / "truth.tmp")
                (folder / "truth.tmp").replace(folder / "truth.pt")
            for batch in range(options.batches):
                if batch in done:
                    continue
                rollouts = draw(f"rollouts of batch {batch + 1}", small * (options.times + batch), small)
                label = f"batch {batch + 1} of {options.batches}"
                wanted = asked_signals(options)
                done[batch] = measure_batch(
                    passes, inputs.problems, rollouts, truth, budgets, progress, wanted=wanted, name=label
                )
                log.append({"batch": batch, "rows": done[batch]})
    measured = [rows for rows in done.values() if rows]
    if not measured:
        raise UserError(
            f"none of {len(done)} small batches has a question with both right and wrong rollouts: raise --questions "
            f"({small}) or rollout.samples_per_question ({samples})"
        )
    empty = f" ({len(done) - len(measured)} more had no gradient)" if len(measured) < len(done) else ""
    text = (
        f"# Gradients of {config.model.path}\n\nCosine between the gradient of {small} questions x {samples} rollouts "
        f"on selected tokens and that of {small * options.times} other questions on all tokens: mean over "
        f"{len(measured)} batches{empty} and 95 % interval, bootstrapped over them. Lowest: as many tokens from the "
        "other end.\n\n"
    ) + tables(measured, budgets)
    (folder / "gradients.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def shares(text: str) -> list[float]:
    """UserError unless these are numbers above 0 and below 1, by comma."""
    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < each < 1 for each in found):
        raise UserError(f"--budgets: {text!r} is no list of shares of a completion's tokens: take 0.05,0.1,0.2,0.5")
    return found


if __name__ == "__main__":
    sys.exit(main())
