"""What the language-model head costs at the selected positions alone:  python bench/head.py [--quick]

Log-probabilities and their gradients at 1 to 100 % of the positions, chunk by chunk (aipo/policy.py), against the
dense head: logits of all positions in bfloat16, their log-softmax in float32, autograd. Random states and weights,
the vocabulary and width of SmolLM2-135M (of Qwen3-1.7B on a GPU), float32 under bfloat16 autocast as in training.
Each measurement is a process of its own; the table goes to bench/results/head-MACHINE.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from aipo.evaluation.results import markdown
from aipo.plan.planner import PUBLISHED
from aipo.policy import _head_forward
from bench.machine import machine, slug
from bench.measure import Clock, measured, median

ROOT = Path(__file__).resolve().parents[1]
SHARES = [0.01, 0.05, 0.1, 0.2, 0.5, 1.0]
GOAL_SHARE, GOAL = 0.2, 0.3


def child(options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each repetition and peak bytes, of the dense head (``share`` None) or at a share of the positions."""
    torch.set_num_threads(options["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokens, share = options["tokens"], options["share"]
    hidden = torch.randn(tokens, options["width"], device=device, requires_grad=True)  # (N, d)
    targets = torch.randint(options["vocabulary"], (tokens,), device=device)  # (N,)
    head = nn.Linear(options["width"], options["vocabulary"], bias=False, device=device)
    if share is not None:
        head.forward = MethodType(_head_forward, head)  # type: ignore[method-assign]
        chosen = torch.randperm(tokens, device=device)[: round(share * tokens)]  # (K,)

    def step(_data: None, clock: Clock) -> None:
        with clock("forward"), torch.autocast(device.type, torch.bfloat16):
            if share is None:
                logits = head(hidden)  # (N, V)
                logp = logits.float().log_softmax(-1).gather(-1, targets[:, None])  # (N, 1)
            else:
                logp, _ = head(hidden[chosen], targets[chosen], temperature=1.0, chunk=options["chunk"])  # (K,)
        with clock("backward"):
            logp.sum().backward()
        hidden.grad = head.weight.grad = None

    return measured(step, None, warm_up=None, repeats=options["repeats"])


def start(options: dict[str, Any]) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(options["threads"]), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "bench/head.py", "--child", json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{options} failed:\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = [sum(each.values()) for each in found["seconds"]]
    kind = "dense" if options["share"] is None else f"{100 * options['share']:.0f} %"
    print(f"{options['tokens']} positions, {kind}: {median(seconds):.3f} s", file=sys.stderr, flush=True)
    return {"seconds": seconds, "peak": found["peak"] / 2**20}


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer positions and repetitions, nothing written")
    parser.add_argument("--model", default="Qwen/Qwen3-1.7B" if cuda else "embedded:smollm2-135m")
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 2048, help="positions of the time ratios")
    parser.add_argument("--chunk", type=int, default=1024 if cuda else 512, help="positions whose logits exist")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    if arguments.quick:
        arguments.tokens, arguments.repeats, arguments.rounds = arguments.tokens // 4, 1, 1
    shape = PUBLISHED[arguments.model]
    options = {
        "width": shape["hidden_size"],
        "vocabulary": shape["vocab_size"],
        "chunk": arguments.chunk,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "tokens": arguments.tokens,
    }
    found: dict[float | None, list[dict[str, Any]]] = {share: [] for share in (None, *SHARES)}
    for _ in range(arguments.rounds):
        for share, runs in found.items():
            runs.append(start({**options, "share": share}))
    cells = []
    for share, runs in found.items():
        seconds = [each for run in runs for each in run["seconds"]]
        pairs = [median(run["seconds"]) / median(dense["seconds"]) for run, dense in zip(runs, found[None])]
        goal = f"≤ {GOAL:g}: {'yes' if median(pairs) <= GOAL else 'no'}" if share == GOAL_SHARE else ""
        cells.append(
            [
                "dense" if share is None else f"{100 * share:.0f} %",
                f"{median(seconds):.3f}",
                f"{min(seconds):.3f} – {max(seconds):.3f}",
                f"{median(pairs):.2f}",
                f"{min(pairs):.2f} – {max(pairs):.2f}",
                goal,
                f"{median([run['peak'] for run in runs]):,.0f}",
            ]
        )
    columns = ["positions", "s", "min – max", "ratio to dense", "over rounds", "goal", "peak MiB"]
    speed = markdown(columns, cells)

    cells = []
    for tokens in (arguments.tokens // 2, arguments.tokens, 2 * arguments.tokens):
        kinds = [
            start({**options, "tokens": tokens, "share": share, "repeats": 1})["peak"] for share in (None, 1.0, 0.2)
        ]
        cells.append([f"{tokens:,}", *(f"{each:,.0f}" for each in kinds)])
    memory = markdown(["positions", "dense, MiB", "100 %, MiB", "20 %, MiB"], cells)
    gradient = 4 * options["width"] * options["vocabulary"] / 2**20
    text = f"""# The head at the selected positions

{machine()}, {arguments.threads} threads; Python {platform.python_version()}, torch {version("torch")}; load average
{os.getloadavg()[0]:.1f} at the end. V = {options["vocabulary"]}, d = {options["width"]}, chunks of {arguments.chunk};
forward and backward at {arguments.tokens:,} positions, {arguments.rounds} rounds of {arguments.repeats} repetitions.

{speed}
Peak memory above states and weight; the gradients of both are in it, the weight's with {gradient:,.0f} MiB.

{memory}"""
    print(text)
    if not arguments.quick:
        target = ROOT / "bench" / "results" / f"head-{slug()}.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
        print(f"written to {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
