"""Run folders and evaluations made up on the spot, through the code that writes real ones where there is such."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa

from aipo.config import dump_config, load_config
from aipo.record.tracker import Tracker, prepare_run_folder

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script><!-- ",
    '"><img src=x onerror="window.hacked = 3">',
    "{{ 7 * 7 }} {% raw %} ${window.hacked = 4}",
    "\u202eright to left\u202c שלום עולם مرحبا",
    "a\x00b\x07c\x1b[31mred\x7f\u2028\u2029\ufeff",
    "👩‍👩‍👧‍👦 🇪🇺 ﷽ Z̸̢̛͇a̴l̵g̶o",
    "]]> --> <!-- \\u003c/script\\u003e &lt;b&gt; &amp;",
    "x" * 200_000,
)


def rollout(tokens: list[str], seed: int, **more: Any) -> dict[str, Any]:
    """A row of the table that the trainer records."""
    draw = random.Random(seed)
    count = len(tokens)
    mask = [draw.random() < 0.3 for _ in tokens]
    figure = lambda: [draw.random() if m else None for m in mask]  # noqa: E731
    return {
        "group": 0, "sample": 0, "group_size": 2, "question_id": "q", "bucket": "easy",
        "question": "What is 1 + 1?", "prompt": "user: What is 1 + 1?",
        "answer": "2", "extracted": "2", "completion": "".join(tokens), "reward": 1.0, "correct": True,
        "advantage": 0.5, "used": True, "reason": "", "finish_reason": "stop", "token_ids": list(range(count)),
        "tokens": tokens, "mi": [draw.random() for _ in tokens], "mask": mask, "logp": figure(), "ratio": figure(),
        "advantage_token": [0.5 if m else None for m in mask], "entropy": figure(), "mismatch": figure(),
        "weight": figure(),
    } | more  # fmt: skip


def make_run(
    folder: Path,
    *,
    steps: int = 12,
    said: str = " 1 + 1 is \\boxed{2}",
    texts: tuple[str, ...] = (),
    change: float = 0.3,
    **keys: str,
) -> Path:
    """A run of ``steps`` steps whose rollouts say ``said``; in the first, each of ``texts`` has a group as well."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in {"optim__steps": str(steps), **keys}.items()]
    config = load_config("smollm2_135m.yaml", [*overrides, f"name={folder.name}", f"runs={folder.parent}"])
    prepare_run_folder(folder, "none", config_text=dump_config(config), command=["train.py", "--config", "x"]).release()
    tracker, draw = Tracker(folder, wandb_mode="disabled", plot_every=10_000), random.Random(0)
    tracker.draw = lambda: None  # type: ignore[method-assign]  # a second for a picture that no report shows
    for step in range(steps + 1):
        done = step / steps
        metrics: dict[str, float] = {}
        if step:
            metrics = {f"time/{phase}_s": draw.random() for phase in ("rollout", "forward", "backward", "optimizer")}
            metrics |= {"reward/mean": 0.2 + change * done, "reward/correct": 0.2 + change * done}
            metrics |= {"policy/entropy": 1.0, "rollout/length_mean": 20.0, "rollout/tokens": 1000.0}
            metrics |= {
                "rollout/used_tokens": 500.0,
                "mask/otf": 0.3,
                "mask/cost_share": 0.15,
                "mask/kappa": 0.3 - done / 10,
            }
            metrics |= {"rollout/used": 0.6, "rollout/truncated": 0.0, "mismatch/gap": 0.01, "loss/skipped_steps": 0.0}
            metrics |= {"policy/grad_norm": draw.random(), "reward/timed_out": 0.0, "reward/killed": 0.0}
            metrics |= {f"curriculum/questions_{name}": 100.0 for name in ("easy", "medium", "hard")}
        if step in (0, steps):
            right = 0.2 + change * done
            metrics |= {"validation/accuracy": right, "validation/accuracy_low": right - 0.1}
            metrics |= {"validation/accuracy_high": right + 0.1}
            tracker.log_answers(
                step,
                [{"id": str(q), "question": f"{q} + 1 =", "right": [q < round(100 * right)] * 2} for q in range(100)],
            )
        tracker.log(step, metrics)
        if step:
            rows = []
            for group, text in enumerate((said, *(texts if step == 1 else ()))):
                words = [text[i : i + 4] for i in range(0, len(text), 4)]
                for sample in range(2):
                    more = {"group": group, "sample": sample, "correct": sample == 0, "reward": 1.0 - sample}
                    if group:
                        more |= {"question": text[:500], "prompt": text, "answer": text[:100], "extracted": text[:3000]}
                    rows.append(rollout(words, seed=step + sample, **more))
            rows.append(rollout(["no"], 0, group=99, used=False, reason="all of its group got the same verdict"))
            tracker.log_rollouts(step, [], pa.Table.from_pylist(rows))
    tracker.close()
    return folder


def make_evaluation(folder: Path, right: float, *, texts: tuple[str, ...] = ()) -> Path:
    """An evaluation of 20 problems with four samples each."""
    from aipo.evaluation.benchmarks import Benchmark
    from aipo.evaluation.results import save_results, summarize
    from aipo.problems.datasets import Problem, fingerprint

    folder.mkdir()
    problems = [Problem(f"p{i}", f"What is {i} + 1?", str(i + 1)) for i in range(20)]
    draw, rows = random.Random(1), []
    for place, problem in enumerate(problems):
        for sample in range(4):
            verdict = "correct" if draw.random() < right else "no_answer" if sample == 3 else "wrong"
            text = texts[place % len(texts)] if texts else "no idea"
            rows.append(
                {
                    "benchmark": "sums", "id": problem.id, "sample": sample, "gold": problem.answer, "tokens": 5,
                    "answer": None if verdict == "no_answer" else "7", "finish_reason": "stop", "verdict": verdict,
                    "correct": verdict == "correct", "question": text if texts else problem.question,
                    "completion": text, "seed": 0,
                }
            )  # fmt: skip
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {"sums": summarize(Benchmark("sums", problems, fingerprint(problems)), rows, 4)}
    save_results(folder, {"model": folder.name, "settings": {"seed": 0}, "versions": {}}, results)
    return folder
