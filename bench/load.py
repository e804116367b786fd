"""What a busy program beside it costs a step of the embedded default:  python bench/load.py [--quick]

train.py runs twice as ``make train`` starts it (vLLM, DeepSpeed, the verifier), the same steps with the same seed.
Beside every other step, and in the second run beside the other ones, a loop that does nothing keeps one core busy; so
each step was measured with it and without, and a machine that drifts hits both alike. A step is all its phases; the
first is a warm-up. The table goes to bench/results/load-MACHINE.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aipo.evaluation.results import markdown  # noqa: E402
from bench.machine import machine, slug  # noqa: E402
from bench.measure import median  # noqa: E402

GOAL = 2.2
FIXED = (
    "curriculum.enabled=false",
    "advantage.drop_constant_groups=none",  # which groups vary would decide how much there is to do
    "validation.questions=4",
    "validation.samples=1",
    "tracking.wandb=disabled",
)
LAUNCHERS = {1: ["accelerate", "launch"], 2: ["torchrun", "--standalone", "--nproc_per_node=2"]}  # by ranks
PHASES = ("rollout", "forward", "backward", "optimizer", "sync")
Step = dict[str, float]  # a line of metrics.jsonl


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """The last core is kept busy, if wanted."""
    if not wanted:
        yield
        return
    core = max(os.sched_getaffinity(0))
    loop = subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"])
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


def measure(ranks: int, *, odd: bool, steps: int, questions: int) -> tuple[list[Step], int]:
    """Metrics of each step after the first, and peak bytes; the load lies on the odd steps or on the even ones."""
    with tempfile.TemporaryDirectory() as work:
        keys = [*FIXED, f"optim.steps={steps + 1}", f"rollout.questions_per_step={questions}", f"runs={work}"]
        command = [*LAUNCHERS[ranks], "train.py", "--config", "smollm2_135m.yaml", *keys, "name=load"]
        environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}  # of which a rank uses its share
        folder, output = Path(work) / "load", Path(work) / "output"
        with output.open("w") as out:
            run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
            for step in range(1, steps + 2):
                with busy(step > 1 and step % 2 == odd):
                    while len(lines(folder)) < step and run.poll() is None:
                        time.sleep(0.02)
            if run.wait():
                sys.exit(f"train.py ended with {run.returncode}\n{output.read_text()[-3000:]}")
        peak = json.loads((folder / "summary.json").read_text())["peak_memory_bytes"]["host"]
        return lines(folder)[1:], peak


def lines(folder: Path) -> list[Step]:
    """The finished steps of a run."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in whole if "time/rollout_s" in line]


def seconds(step: Step, phase: str = "") -> float:
    """Of one phase, or of all."""
    return sum(v for k, v in step.items() if k.startswith("time/") and (not phase or k == f"time/{phase}_s"))


def compare(ranks: int, *, steps: int, questions: int) -> tuple[list[list[str]], float]:
    """What the load does to a step and to each of its phases, as rows of a table; and peak GiB of a rank."""
    runs, peaks = zip(*(measure(ranks, odd=odd, steps=steps, questions=questions) for odd in (False, True)))
    for a, b in zip(*runs):
        if a["rollout/tokens"] != b["rollout/tokens"]:
            sys.exit("the runs drew different tokens, so their steps cannot be compared")
    # the first measured step is number 2, and the first run has its load on the even ones
    pairs = [(a, b) if i % 2 else (b, a) for i, (a, b) in enumerate(zip(*runs))]  # (quiet, loaded)
    rows = []
    for phase in ("", *PHASES):
        ratios = [seconds(loaded, phase) / seconds(quiet, phase) for quiet, loaded in pairs]
        medians = [f"{median([seconds(pair[i], phase) for pair in pairs]):.2f}" for i in (0, 1)]
        spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
        rows.append([phase or "**step**", *medians, f"{median(ratios):.2f}", spread])
    return rows, max(peaks) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps instead of four; nothing is written")
    parser.add_argument("--ranks", type=int, choices=LAUNCHERS, default=1, help="default: 1, as `make train` has it")
    arguments = parser.parse_args()
    steps, questions = 2 if arguments.quick else 4, 4
    load_before = os.getloadavg()[0]
    rows, peak = compare(arguments.ranks, steps=steps, questions=questions)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    text = f"""# A step beside a busy program

{machine()}; {packages}; load average {load_before:.1f} at the start.
SmolLM2-135M with vLLM and ZeRO-3, ranks: {arguments.ranks}, `OMP_NUM_THREADS={os.cpu_count()}`.
{steps} steps of {questions} questions × 8 samples, each once alone and once beside a loop that keeps one core busy;
medians. Goal: at most {GOAL} times as long.

{markdown(["", "quiet, s", "loaded, s", "loaded / quiet", "min – max"], rows)}
Peak of a rank: {peak:.2f} GiB.
"""
    print(text)
    if not arguments.quick:
        target = ROOT / "bench" / "results" / f"load-{slug()}{'-2-ranks' if arguments.ranks == 2 else ''}.md"
        target.write_text(text)
        print(f"written to {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
