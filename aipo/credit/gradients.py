"""How well the gradient on selected tokens points where a much larger batch's on all tokens does.

python -m aipo.credit.gradients --config CONFIG [--model MODEL] [key=value]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aipo import distributed
from aipo.advantage import group_advantages
from aipo.config import Config
from aipo.credit.frozen import build, command, configured, prepare
from aipo.credit.signals import all_signals
from aipo.errors import UserError
from aipo.evaluation.results import markdown
from aipo.inputs import Inputs, check_inputs
from aipo.layout import token_grid
from aipo.mask import lowest
from aipo.model.precision import choose
from aipo.passes import Passes
from aipo.problems.problem import Problem
from aipo.record.jsonl import JsonlLog, read_jsonl
from aipo.record.progress import Progress
from aipo.rollout import Sampling
from aipo.rollout.collect import Collector
from aipo.rollouts import Rollouts
from aipo.sharding import Sharded, trainable

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
    """The round(fraction n) highest scores of every completion, at least one: (B, T), (B,) -> bool (B, T)."""
    counted = token_grid(lengths, scores.shape[1]) & scores.isfinite()  # (B, T)
    return lowest(-scores, counted, (fraction * lengths).round().clamp(min=1).long())


def measure_batch(
    config: Config,
    sharded: Sharded,
    collector: Collector,
    inputs: Inputs,
    rollouts: Rollouts,
    truth: Tensor,
    budgets: Sequence[float],
    device: torch.device,
    wanted: Sequence[str],
) -> list[dict[str, object]]:
    """Cosines of one small batch with the gradient ``truth`` (P,), a line for each signal and budget."""
    passes, lengths = Passes(config, sharded, inputs.prompter, device), rollouts.lengths
    every = token_grid(lengths, int(lengths.max()))  # (B, T)
    place = torch.arange(1, every.shape[1] + 1)  # (T,)
    found: list[dict[str, object]] = []

    def add(name: str, budget: float, mask: Tensor) -> None:
        own = gradient(passes, rollouts, mask)
        cosine = float(torch.nn.functional.cosine_similarity(own, truth, dim=0))
        read = float(torch.where(mask, place, 0).amax(1).sum() / lengths.sum())
        found.append({"signal": name, "budget": budget, "cosine": cosine, "read": read})

    add("all tokens", 1.0, every)
    for name, scores in all_signals(config, sharded, inputs.prompter, inputs.problems, rollouts, device, only=wanted):
        for budget in budgets:
            add(name, budget, top(scores, lengths, budget))
            add(f"{name}, lowest", budget, top(-scores, lengths, budget))
    return found


def table(rows: Sequence[dict[str, float | str]], budgets: Sequence[float]) -> str:
    """Mean cosine and its standard error over batches at every budget, best at the second first."""
    names = list(dict.fromkeys(str(row["signal"]) for row in rows))
    cells = []
    for name in names:
        line, order = [name], -1.0
        for i, budget in enumerate(budgets):
            own = [float(r["cosine"]) for r in rows if r["signal"] == name and r["budget"] in (budget, 1.0)]
            error = np.std(own, ddof=1) / np.sqrt(len(own)) if len(own) > 1 else np.nan
            line.append(f"{np.mean(own):.3f} ± {error:.3f}")
            order = float(np.mean(own)) if i == min(1, len(budgets) - 1) else order
        read = [float(r["read"]) for r in rows if r["signal"] == name and r["budget"] in (max(budgets), 1.0)]
        cells.append((order, [*line, f"{np.mean(read):.0%}"]))
    columns = ["signal", *(f"{budget:.0%} of tokens" for budget in budgets), f"read at {max(budgets):.0%}"]
    return markdown(columns, [cell for _, cell in sorted(cells, key=lambda each: -each[0])])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    asked = "of a run: model, training questions, sampling, keys of mi"
    parser = command("aipo.credit.gradients", __doc__, asked)
    parser.add_argument("--questions", type=int, default=8, help="of a small batch (8)")
    parser.add_argument("--times", type=int, default=TIMES, help=f"the large batch, in small ones ({TIMES})")
    parser.add_argument("--batches", type=int, default=8, help="small batches that are averaged (8)")
    parser.add_argument("--budgets", default="0.05,0.1,0.2,0.5", help="shares of a completion's tokens, by comma")
    parser.add_argument("--signals", default="", help="by comma (default: all)")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.times < TIMES:
            raise UserError(
                f"--times: {options.times} is below {TIMES}: the large batch would be as noisy as a small one"
            )
        config = configured(options)
        folder = Path(options.out or Path("runs/credit") / f"{config.name}-gradients")
        return distributed.launch(lambda device: run(config, options, folder, device))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(config: Config, options: argparse.Namespace, folder: Path, device: torch.device) -> int:
    config = choose(config.model.dtype, device.type).settle(config)
    inputs = check_inputs(config, world=1)
    small, budgets = options.questions, [float(each) for each in options.budgets.split(",")]
    needed = small * (options.times + options.batches)
    if len(inputs.problems) < needed:
        raise UserError(
            f"data.train has {len(inputs.problems)} questions, and {needed} are needed (--questions x (--times + "
            "--batches)): lower one of them"
        )
    asked = {name: getattr(options, name) for name in ("questions", "times", "budgets", "signals")}
    prepare(folder, config, **asked)
    sampling, samples = Sampling.of(config.rollout), config.rollout.samples_per_question

    with Progress() as progress:
        collector, sharded = build(config, inputs, device)

        def draw(problems: Sequence[Problem]) -> Rollouts:
            rollouts = collector.collect(problems, sampling, samples=samples, stream="gradients")
            collector.judge(rollouts)
            return rollouts

        with closing(collector.engine), closing(collector.rewarder):
            large = draw(inputs.problems[: small * options.times])
            accuracy = float(large.correct.float().mean())
            if accuracy in (0, 1):
                raise UserError(
                    f"the model is right in {accuracy:.0%} of {len(large.correct)} rollouts, "
                    "so there is no gradient. Take other questions (data.train) or another --model"
                )
            passes = Passes(config, sharded, inputs.prompter, device)
            truth = gradient(passes, large, token_grid(large.lengths, int(large.lengths.max())))
            log = JsonlLog(folder / "cosines.jsonl")
            done = {row["batch"] for row in read_jsonl(folder / "cosines.jsonl")}
            with progress.task("batches", options.batches) as task, closing(log):
                for batch in range(options.batches):
                    start = small * (options.times + batch)
                    if batch not in done:
                        rollouts = draw(inputs.problems[start : start + small])
                        wanted = [name for name in options.signals.split(",") if name]
                        found = measure_batch(
                            config, sharded, collector, inputs, rollouts, truth, budgets, device, wanted
                        )
                        log.append({"batch": batch, "rows": found})
                    task.advance()
    rows = [row for line in read_jsonl(folder / "cosines.jsonl") for row in line["rows"]]
    text = (
        f"# Gradients of {config.model.path}\n\nCosine between the gradient of {small} questions x {samples} rollouts "
        f"on selected tokens and that of {small * options.times} other questions on all tokens; mean and standard "
        f"error over {options.batches} batches. Read: share of the completion tokens up to the last selected one.\n\n"
    ) + table(rows, budgets)
    (folder / "gradients.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
