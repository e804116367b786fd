"""What recording the figures of tokens costs a step: seconds and bytes, at the embedded scale and at the paper's.

    python bench/record.py

Everything that the recorder does in a step is timed, on made-up figures: choosing, copying out of every micro-batch,
building the table, writing and forcing it to disk. A step of the embedded default takes 8 s and more on two cores, one
of Qwen3-8B on eight GPUs minutes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoTokenizer

from aipo.config import load_config
from aipo.layout import micro_batches
from aipo.loss import LossInputs
from aipo.problems.datasets import Problem
from aipo.problems.embedded import embedded_model
from aipo.record.tokens import TokenRecorder
from aipo.record.tracker import Tracker
from aipo.rollout.base import Completion
from aipo.rollouts import Rollouts

SCALES = {"embedded": ("smollm2_135m.yaml", 21, 110), "paper, one of 8 ranks": ("qwen3_8b.yaml", 4000, 200)}
STEPS = 5


def record(config_name: str, tokens: int, prompt: int, folder: Path) -> tuple[float, int, int]:
    """Median seconds of a step, bytes of its Parquet file, rollouts in it."""
    config = load_config(config_name)
    n, ranks = config.rollout.samples_per_question, 1 if tokens < 1000 else 8
    questions = config.rollout.questions_per_step // ranks
    tokenizer, draw = AutoTokenizer.from_pretrained(embedded_model()), torch.Generator().manual_seed(0)
    ids = [torch.randint(100, 40_000, (tokens,), generator=draw).tolist() for _ in range(questions * n)]
    rollouts = Rollouts(
        problems=[Problem(str(q), f"question {q}", "1") for q in range(questions)],
        prompts=[[100] * prompt] * questions,
        completions=[Completion(each, [-1.0] * tokens, "stop") for each in ids],
        group_size=n,
        ids=torch.arange(len(ids)),
        rewards=torch.rand(len(ids)),
        correct=torch.rand(len(ids)) < 0.5,
        texts=[tokenizer.decode(each) for each in ids],
        advantages=torch.randn(len(ids)),
        used=torch.ones(len(ids), dtype=torch.bool),
    )
    scores = torch.rand(len(ids), tokens)  # (B, T)
    selection = SimpleNamespace(scores=scores, mask=scores < 0.3)
    batches = micro_batches(rollouts.each_prompt, ids, budget=config.optim.micro_tokens, packing=False)
    recorder = TokenRecorder(config, SimpleNamespace(tokenizer=tokenizer), None)  # type: ignore[arg-type]
    tracker = Tracker(folder, wandb_mode="disabled")
    seconds = []
    for step in range(1, STEPS + 1):
        inputs = []
        for micro in batches:
            mask = micro.rows_of(selection.mask)  # (b, t)
            values = torch.randn(mask.shape)  # (b, t)
            inputs.append(LossInputs(values, values, rollouts.advantages[micro.rows], mask, values, values))
        start = time.perf_counter()
        recorder.start(rollouts, {})
        for micro, each in zip(batches, inputs):
            chosen = micro.ragged_of(selection.mask)  # (N,)
            recorder.see(micro, each, torch.rand(int(chosen.sum())), chosen)
        recorder.write(tracker, step, selection)  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - start)
    file = folder / "rollouts" / f"step-{STEPS:06d}.parquet"
    return statistics.median(seconds), file.stat().st_size, len(recorder.rows)


def main() -> None:
    torch.set_num_threads(1)
    for name, (config, tokens, prompt) in SCALES.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds, size, rows = record(config, tokens, prompt, Path(folder))
        print(f"{name}: {1000 * seconds:.0f} ms a step, {size / 1000:.0f} kB, {rows} rollouts of {tokens} tokens")


if __name__ == "__main__":
    main()
