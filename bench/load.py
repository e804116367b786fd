"""What a busy program beside it costs a step of the embedded default:  python bench/load.py [--quick] [--spinning]

train.py runs twice as ``make train`` starts it (vLLM, DeepSpeed, the verifier), the same steps with the same seed.
Beside every other step, and in the second run beside the other ones, a loop that does nothing keeps one core busy; so
each step was measured with it and without, and a machine that drifts hits both alike. A step is all its phases; the
first is a warm-up. The table goes to bench/results/load-MACHINE.md.

--spinning asks the other question, what threads that sleep while they wait cost where nothing else runs: a run of ours
and one with threads that spin make their steps in turn, and one is stopped meanwhile (17 GiB in all). Its table goes
to bench/results/spinning-MACHINE.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from scipy.stats import quantile_test

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
OURS: dict[str, str] = {}  # nothing set: aipo.threads settles it
SPINNING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"}  # GNU's own count where no policy is set
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


def start(work: Path, ranks: int, *, steps: int, questions: int, waiting: Mapping[str, str] = OURS) -> subprocess.Popen:
    """train.py with its run folder ``work/load``, its output in ``work/output``, in a process group of its own."""
    keys = [*FIXED, f"optim.steps={steps + 1}", f"rollout.questions_per_step={questions}", f"runs={work}"]
    command = [*LAUNCHERS[ranks], "train.py", "--config", "smollm2_135m.yaml", *keys, "name=load"]
    environment = {key: value for key, value in os.environ.items() if key not in SPINNING} | waiting
    environment["OMP_NUM_THREADS"] = str(os.cpu_count())  # of which a rank uses its share
    with (work / "output").open("w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)


def until(step: int, run: subprocess.Popen, work: Path) -> None:
    """Wait until that many steps are made, or the run has ended."""
    while len(lines(work / "load")) < step and run.poll() is None:
        time.sleep(0.02)


def finished(run: subprocess.Popen, work: Path) -> tuple[list[Step], int]:
    """Metrics of each step after the first, and peak bytes."""
    if run.wait():
        sys.exit(f"train.py ended with {run.returncode}\n{(work / 'output').read_text()[-3000:]}")
    summary = json.loads((work / "load" / "summary.json").read_text())
    return lines(work / "load")[1:], summary["peak_memory_bytes"]["host"]


def measure(ranks: int, *, odd: bool, steps: int, questions: int) -> tuple[list[Step], int]:
    """Metrics of each step after the first, and peak bytes; the load lies on the odd steps, or on the even ones."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = start(work, ranks, steps=steps, questions=questions)
        for step in range(1, steps + 2):
            with busy(step > 1 and step % 2 == odd):
                until(step, run, work)
        return finished(run, work)


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
        same_tokens(a, b)
    # the first measured step is number 2, and the first run has its load on the even ones
    pairs = [(a, b) if i % 2 else (b, a) for i, (a, b) in enumerate(zip(*runs))]  # (quiet, loaded)
    return table(pairs, extremes), max(peaks) / 2**30


def table(pairs: Sequence[tuple[Step, Step]], spread: Callable[[list[float]], tuple[float, float]]) -> list[list[str]]:
    """Medians of both of each pair and of their ratios, of a step and of each of its phases."""
    rows = []
    for phase in ("", *PHASES):
        ratios = [seconds(second, phase) / seconds(first, phase) for first, second in pairs]
        medians = [f"{median([seconds(pair[i], phase) for pair in pairs]):.2f}" for i in (0, 1)]
        rows.append([phase or "**step**", *medians, f"{median(ratios):.2f}", "{:.2f} – {:.2f}".format(*spread(ratios))])
    return rows


def extremes(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the median, 95 %, by the sign test."""
    low, high = quantile_test(values, p=0.5).confidence_interval()
    return float(low), float(high)


def same_tokens(*steps: Step) -> None:
    if len({step["rollout/tokens"] for step in steps}) > 1:
        sys.exit("the runs drew different tokens, so their steps cannot be compared")


def spinning(*, steps: int, questions: int) -> tuple[list[list[str]], float]:
    """A step and its phases with threads that wait as ours do, and with threads that spin: rows of a table; and peak
    GiB.

    Both runs are there at once, and one is stopped while the other makes its step, so that what the machine gives a
    minute later touches no ratio. What a run takes is counted here: its own clock goes on while it is stopped, which
    lengthens its rollout.
    """
    with tempfile.TemporaryDirectory() as spun, tempfile.TemporaryDirectory() as ours:
        works = (Path(spun), Path(ours))
        runs = []
        try:
            for work, waiting in zip(works, (SPINNING, OURS)):
                runs.append(start(work, 1, steps=steps, questions=questions, waiting=waiting))
                until(1, runs[-1], work)
                os.killpg(runs[-1].pid, signal.SIGSTOP)
            took: tuple[list[float], list[float]] = ([], [])
            for step in range(2, steps + 2):
                for i in (0, 1) if step % 2 else (1, 0):
                    begin = time.perf_counter()
                    os.killpg(runs[i].pid, signal.SIGCONT)
                    until(step, runs[i], works[i])
                    took[i].append(time.perf_counter() - begin)
                    if step <= steps:  # after the last it ends by itself
                        os.killpg(runs[i].pid, signal.SIGSTOP)
                    else:
                        runs[i].wait()
            made, peaks = zip(*(finished(run, work) for run, work in zip(runs, works)))
        finally:
            for run in runs:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)
    for i in (0, 1):
        for step, whole in zip(made[i], took[i]):
            rest = {key: value for key, value in step.items() if key != "time/rollout_s"}
            step["time/rollout_s"] = whole - seconds(rest)
    for a, b in zip(*made):
        same_tokens(a, b)
    return table([*zip(*made)], interval), max(peaks) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps instead of four; nothing is written")
    parser.add_argument("--ranks", type=int, choices=LAUNCHERS, default=1, help="default: 1, as `make train` has it")
    parser.add_argument("--spinning", action="store_true", help="sleeping threads beside spinning ones, without a load")
    arguments = parser.parse_args()
    if arguments.spinning and arguments.ranks > 1:
        parser.error("--spinning is measured with one rank")  # torchrun's ranks are no process group to be stopped
    steps, questions = 2 if arguments.quick else 32 if arguments.spinning else 4, 4
    load_before = os.getloadavg()[0]
    if arguments.spinning:
        rows, peak = spinning(steps=steps, questions=questions)
    else:
        rows, peak = compare(arguments.ranks, steps=steps, questions=questions)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    if arguments.spinning:
        title, columns = "Threads that sleep while they wait", ["", "spinning, s", "sleeping, s", "ratio", "95 %"]
        about = f"""{steps} steps of {questions} questions × 8 samples with each, in turn, nothing beside them: one run
is stopped while the other makes its step. Medians, and the interval of the median of the ratios sleeping / spinning."""
    else:
        title, columns = "A step beside a busy program", ["", "quiet, s", "loaded, s", "loaded / quiet", "min – max"]
        about = f"""{steps} steps of {questions} questions × 8 samples, each once alone and once beside a loop that
keeps one core busy; medians. Goal: at most {GOAL} times as long."""
    text = f"""# {title}

{machine()}; {packages}; load average {load_before:.1f} at the start.
SmolLM2-135M with vLLM and ZeRO-3, ranks: {arguments.ranks}, `OMP_NUM_THREADS={os.cpu_count()}`.
{about}

{markdown(columns, rows)}
Peak of a rank: {peak:.2f} GiB.
"""
    print(text)
    if not arguments.quick:
        name = "spinning" if arguments.spinning else "load"
        target = ROOT / "bench" / "results" / f"{name}-{slug()}{'-2-ranks' if arguments.ranks == 2 else ''}.md"
        target.write_text(text)
        print(f"written to {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
