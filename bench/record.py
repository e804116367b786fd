"""What recording the figures of tokens costs a step, and the report its run: seconds and bytes, at the embedded scale
and at the paper's.

    python bench/record.py

Everything that the recorder does in a step is timed, on made-up figures: choosing, copying out of every micro-batch,
building the table, writing and forcing it to disk. The report is of a run of all steps of the config, which all
have the rollouts of the last one timed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoTokenizer

from aipo.config import Config, load_config
from aipo.layout import micro_batches
from aipo.loss import LossInputs
from aipo.problems.datasets import Problem
from aipo.problems.embedded import embedded_model
from aipo.record.tokens import TokenRecorder
from aipo.record.tracker import Tracker
from aipo.report.run_report import report
from aipo.rollout.base import Completion
from aipo.rollouts import Rollouts

SCALES = {
    "embedded": ("smollm2_135m.yaml", 22, 140),
    "paper, one of 8 ranks": ("qwen3_8b.yaml", 4000, 200),
    "paper, at its longest": ("qwen3_8b.yaml", 12_000, 200),
}
STEPS = 5


def record(config: Config, tokens: int, prompt: int, folder: Path) -> tuple[float, Path, int]:
    """Median seconds of a step, its Parquet file, rollouts in it."""
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
    return statistics.median(seconds), folder / "rollouts" / f"step-{STEPS:06d}.parquet", len(recorder.rows)


def page(last: Path, steps: int) -> tuple[float, int]:
    """Seconds that the report of a run of ``steps`` such steps takes, and its bytes."""
    folder = last.parents[1]
    for step in range(1, steps + 1):
        path = last.with_name(f"step-{step:06d}.parquet")
        if path != last:
            path.unlink(missing_ok=True)
            path.hardlink_to(last)
    lines = [{"step": step, **{f"section/{i}": step / (i + 1) for i in range(40)}} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | {"reward/mean": 0.5}) + "\n" for line in lines))
    start = time.perf_counter()
    path = report([folder])
    return time.perf_counter() - start, path.stat().st_size


def main() -> None:
    torch.set_num_threads(1)
    for name, (config_name, tokens, prompt) in SCALES.items():
        config = load_config(config_name)
        with tempfile.TemporaryDirectory() as folder:
            seconds, file, rows = record(config, tokens, prompt, Path(folder))
            size, lines = (path.stat().st_size / 1000 for path in (file, file.with_suffix(".jsonl")))
            spent, written = page(file, config.optim.steps)
        print(
            f"{name}: {1000 * seconds:.0f} ms a step, {rows} rollouts of {tokens} tokens, {size:.0f} kB and "
            f"{lines:.0f} kB of lines; report of {config.optim.steps} steps: {spent:.1f} s, {written / 1e6:.1f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
