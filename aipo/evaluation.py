"""Accuracy on held-out problems, sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aipo import distributed
from aipo.config import ValidationConfig
from aipo.datasets import Problem
from aipo.metrics import Accuracy, accuracy_summary
from aipo.rollout.base import Sampling
from aipo.rollout.collect import Collector


def validate(
    collector: Collector,
    problems: Sequence[Problem],
    config: ValidationConfig,
    *,
    max_tokens: int,
    on_done: Callable[[], None] | None = None,
) -> tuple[Accuracy, dict[str, float]]:
    """avg@k over all ranks with its 95 % interval, the same on every rank, and metrics for the log.

    The random streams are the same each time: differences between two validations come from the weights alone.
    """
    sampling = Sampling(max_tokens, config.temperature, config.top_p, config.top_k)
    mine = problems[distributed.rank() :: distributed.world_size()]
    rollouts = collector.collect(mine, sampling, samples=config.samples, stream="validation", on_done=on_done)
    collector.judge(rollouts)
    rows = [
        (problem.id, rollouts.correct[q * config.samples : (q + 1) * config.samples].tolist())
        for q, problem in enumerate(mine)
    ]
    lengths = [len(c.token_ids) for c in rollouts.completions]
    truncated = [c.finish_reason == "length" for c in rollouts.completions]
    gathered = distributed.gather_objects((rows, lengths, truncated))
    by_id = dict(row for part in gathered for row in part[0])
    accuracy = accuracy_summary([by_id[problem.id] for problem in problems])
    all_lengths = [n for part in gathered for n in part[1]]
    all_truncated = [t for part in gathered for t in part[2]]
    return accuracy, {
        "validation/accuracy": accuracy.value,
        "validation/accuracy_low": accuracy.low,
        "validation/accuracy_high": accuracy.high,
        "validation/length_mean": sum(all_lengths) / len(all_lengths),
        "validation/truncated": sum(all_truncated) / len(all_truncated),
    }
