"""What one optimizer step costs, side by side:  python bench/step.py [--quick] [--trl]

Forward, scores, mask, log-probabilities, loss, backward, clipping and AdamW on one recorded batch of rollouts
(bench/batches.py), by this package, by a plain PyTorch loop, and by TRL's GRPOTrainer. All have the same tokens,
float32 weights under bfloat16 autocast, attention, micro-batches and optimizer. Each step runs in a process of its
own; the variants take turns over the rounds, so that a machine that drifts hits all of them alike.

On a CPU it is SmolLM2-135M-Instruct; on a GPU the shape of Qwen3-1.7B with random weights, the lengths of the
recorded completions scaled and their ids random. The table goes to bench/results/step-MACHINE.md. Long ones, of up
to 12,000 tokens: --scale 60 --micro-tokens 16384, with --quick for the eight of one question.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import venv
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from aipo.evaluation.results import markdown
from aipo.plan.flops import step_flops
from aipo.plan.planner import PUBLISHED
from bench.batches import QUESTIONS, Batch, load
from bench.machine import machine, slug
from bench.measure import PHASES, median
from bench.our_step import LOOPS, OURS

ROOT = Path(__file__).resolve().parents[1]

TRL = {"trl": ("GRPO, TRL", 1.0), "trl-entropy": ("TRL, fifth of highest entropy", 0.2)}
LABELS = {k: v[0] for k, v in OURS.items()} | LOOPS | {k: v[0] for k, v in TRL.items()}

# ratio of what to what, and at most: on a CPU, on a GPU
GOALS = [
    ("time, AIPO / plain loop", "seconds", "aipo", "plain", 0.7, 0.7),
    ("memory, AIPO / plain loop", "peak", "aipo", "plain", 0.75, 0.75),
    ("time, AIPO / TRL GRPO", "seconds", "aipo", "trl", 0.5, 0.75),
    ("memory, AIPO / TRL GRPO", "peak", "aipo", "trl", 0.5, 0.5),
    ("time, AIPO / TRL with its entropy mask", "seconds", "aipo", "trl-entropy", None, None),
    ("time, AIPO padded / plain loop", "seconds", "aipo-padded", "plain", 0.7, 0.7),
    ("memory, AIPO padded / plain loop", "peak", "aipo-padded", "plain", 0.75, 0.75),
    ("time, AIPO padded / TRL GRPO", "seconds", "aipo-padded", "trl", 0.5, 0.75),
    ("memory, AIPO padded / TRL GRPO", "peak", "aipo-padded", "trl", 0.5, 0.5),
    (
        "time, AIPO padded / plain loop with logits of completions",
        "seconds",
        "aipo-padded",
        "plain-completions",
        None,
        None,
    ),
    ("time, AIPO packed / AIPO padded", "seconds", "aipo-packed", "aipo-padded", None, None),
    ("time, AIPO padded / our GRPO", "seconds", "aipo-padded", "grpo", None, None),
    ("time, separate probe / one forward, both padded", "seconds", "aipo-probe", "aipo-padded", 1.35, 1.35),
]


def start(options: dict[str, Any], python: str) -> dict[str, Any]:
    """What a process of its own prints."""
    name = options["variant"]
    if name in TRL:
        command = [python, "bench/trl_step.py", json.dumps(options | {"quantile": TRL[name][1]})]
    else:
        command = [sys.executable, "bench/our_step.py", json.dumps(options)]
    # threads that spin while they wait would slow the other's work down
    environment = os.environ | {"OMP_NUM_THREADS": str(options["threads"]), "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def trl_python(folder: Path) -> str:
    """The interpreter of TRL's environment, which is made on the first call."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        print(f"installing TRL into {folder}: this takes some minutes", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-qq"]
        if not torch.cuda.is_available():  # as in the Makefile: PyPI has no CPU build
            cpu = [*pip, "--no-deps", f"torch=={version('torch').partition('+')[0]}+cpu"]
            if subprocess.run(cpu, capture_output=True).returncode:
                subprocess.run([*cpu, "--index-url", "https://download.pytorch.org/whl/cpu"], check=True)
        subprocess.run([*pip, "-r", str(ROOT / "bench" / "requirements-trl.txt")], check=True)
        (folder / ".gitignore").write_text("*\n")
        (folder / "made").touch()
    return str(python)


def totals(runs: list[dict[str, Any]]) -> list[float]:
    """Seconds of every step."""
    return [sum(seconds.values()) for run in runs for seconds in run["seconds"]]


def table(found: dict[str, list[dict[str, Any]]], batch: Batch, base: dict[str, Any]) -> str:
    columns = ["variant", "s", "min – max", *PHASES[:1], "MI + mask", *PHASES[2:], "peak GiB", "tokens/s"]
    columns += ["logits at", "MFU, %", "own work, %", "gradient norm"]
    whole = step_flops(base["sizes"], batch.lengths, batch.tokens, batch.generated)
    cells = []
    for name, runs in found.items():
        seconds, last = totals(runs), runs[-1]
        own = step_flops(base["sizes"], batch.lengths, last["tokens"], int(last["positions"]))
        by_phase = [median([each.get(phase, 0.0) for run in runs for each in run["seconds"]]) for phase in PHASES]
        rate = median(seconds) * base["matmul"]
        cells.append(
            [
                LABELS[name],
                f"{median(seconds):.2f}",
                f"{min(seconds):.2f} – {max(seconds):.2f}",
                *(f"{each:.2f}" for each in by_phase),
                f"{median([run['peak'] for run in runs]) / 2**30:.2f}",
                f"{batch.tokens / median(seconds):,.0f}",
                f"{last['positions']:,.0f}",
                f"{100 * whole / rate:.1f}",
                f"{100 * own / rate:.1f}",
                f"{last['norm']:.3f}",
            ]
        )
    return markdown(columns, cells)


def ratios(found: dict[str, list[dict[str, Any]]], *, cuda: bool) -> str:
    """Each the median over rounds, within which both were measured."""

    def value(run: dict[str, Any], quantity: str) -> float:
        return median(totals([run])) if quantity == "seconds" else float(run["peak"])

    cells = []

    def line(label: str, per_round: list[float], limit: float | None, digits: int) -> None:
        spread = f"{min(per_round):.{digits}f} – {max(per_round):.{digits}f}"
        verdict = ["", ""] if limit is None else [f"≤ {limit:g}", "yes" if median(per_round) <= limit else "no"]
        cells.append([label, f"{median(per_round):.{digits}f}", spread, *verdict])

    for label, quantity, ours, theirs, cpu, gpu in GOALS:
        if ours in found and theirs in found:
            pairs = zip(found[ours], found[theirs])
            line(label, [value(a, quantity) / value(b, quantity) for a, b in pairs], gpu if cuda else cpu, 2)
    if "aipo" in found:
        shares = [
            median([100 * each.get("mi", 0.0) / sum(each.values()) for each in run["seconds"]]) for run in found["aipo"]
        ]
        line("MI, mask and peaks, % of AIPO's step", shares, 1.0 if cuda else 3.0, 1)
    return markdown(["ratio", "median", "min – max over rounds", "goal", "met"], cells)


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 sequences, one round, nothing written: two minutes")
    parser.add_argument("--trl", nargs="?", type=Path, const=ROOT / ".venv-trl", metavar="FOLDER")
    parser.add_argument("--variants", default=",".join(LABELS), help=f"by comma (default: {','.join(LABELS)})")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10 if cuda else 1, help="steps of a process, after a warm-up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--micro-tokens", type=int, default=8192 if cuda else 4096, help="padding included")
    parser.add_argument(
        "--model",
        default="Qwen/Qwen3-1.7B" if cuda else "embedded:smollm2-135m",
        help="a checkpoint; with --random a published shape, or one as JSON",
    )
    parser.add_argument("--random", action="store_true", default=cuda, help="random weights (default on a GPU)")
    parser.add_argument("--scale", type=float, default=16.0 if cuda else 1.0, help="of completions; 1 is 130 tokens")
    parser.add_argument("--checkpointing", action="store_true", default=cuda, help="of gradients, in all variants")
    parser.add_argument("--attention", choices=["sdpa", "flash_attention_2"], help="default: flash where installed")
    parser.add_argument("--zero-stage", type=int, default=0, help="of this package's variants; 0 is plain PyTorch")
    parser.add_argument("--out", type=Path, help="where the table goes")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    cuda = torch.cuda.is_available()
    python = trl_python(arguments.trl) if arguments.trl else ""
    names = [name for name in arguments.variants.split(",") if python or name not in TRL]
    flash = find_spec("flash_attn") is not None and not python  # TRL's environment has none
    if arguments.random:
        shape = json.loads(arguments.model) if arguments.model.startswith("{") else PUBLISHED[arguments.model]
        spec, changed = json.dumps(shape), {"scale": arguments.scale, "vocabulary": shape["vocab_size"]}
    else:
        from aipo.problems.embedded import resolve_model

        spec, changed = resolve_model(arguments.model), {}
    questions = 1 if arguments.quick else QUESTIONS if cuda else 2
    options = {
        "model": spec,
        "batch": {"questions": questions, **changed},
        "warm_up": {"questions": questions if cuda else 1, **changed},
        "attention": arguments.attention or ("flash_attention_2" if flash else "sdpa"),
        "checkpointing": arguments.checkpointing,
        "micro_tokens": arguments.micro_tokens,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "zero_stage": arguments.zero_stage,
    }
    load_before = os.getloadavg()[0]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    rounds = 1 if arguments.quick else arguments.rounds
    base: dict[str, Any] = {"matmul": 0.0}
    for i in range(rounds):
        again = start({**options, "variant": None}, python)
        base = again | {"matmul": max(base["matmul"], again["matmul"])}
        print(f"round {i + 1}/{rounds}: matmul {again['matmul'] / 1e12:.2f} TFLOP/s", file=sys.stderr, flush=True)
        for name in names:
            run = start({**options, "variant": name}, python)
            found[name].append(run)
            seconds, peak = median(totals([run])), run["peak"] / 2**30
            print(f"round {i + 1}/{rounds}: {name} {seconds:.2f} s, {peak:.2f} GiB", file=sys.stderr, flush=True)

    batch = load(**options["batch"])
    versions = ["torch", "transformers", *(["deepspeed"] if arguments.zero_stage else [])]
    shown = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in versions)]
    if python:
        shown.append("TRL 1.16.0")
    micro = len(batch.micro_batches(arguments.micro_tokens))
    text = f"""# One optimizer step

{machine()}, {arguments.threads} threads; {", ".join(shown)}; load average {load_before:.1f} at the start.
{arguments.model}{" with random weights" if arguments.random else ""}, {options["attention"]}, float32 weights under
bfloat16 autocast, ZeRO {arguments.zero_stage}, gradient checkpointing {"on" if arguments.checkpointing else "off"};
{len(batch.completions)} sequences of {batch.tokens:,} tokens, {batch.generated:,} of them generated, in {micro}
micro-batches of at most {arguments.micro_tokens} tokens. {rounds} rounds of {arguments.repeats} steps, medians. Fastest
bfloat16 product of square matrices: {base["matmul"] / 1e12:.2f} TFLOP/s.

{table(found, batch, base)}
Peak is above weights and optimizer, so gradients are in it. MFU counts for all variants what GRPO on all tokens needs
(aipo/plan/flops.py: body at every token, head at every generated one, forward and backward) against that product; own
work counts what the variant itself reads, and the head at the positions where it has logits. MI + mask has the peaks
of the curriculum in it. That the gradient norms of all GRPO variants agree says that they compute the same.

{ratios(found, cuda=cuda)}"""
    print(text)
    target = arguments.out
    if target is None and not arguments.quick and found.keys() >= OURS.keys() | LOOPS.keys():
        target = ROOT / "bench" / "results" / f"step-{slug()}{'' if python else '-without-trl'}.md"
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        print(f"written to {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
