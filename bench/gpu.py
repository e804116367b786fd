"""What one GPU does, in eight minutes:  bash bench/gpu.sh [--seconds 480] [--small]

Random weights of Qwen3-1.7B's shape, made on the device; nothing is downloaded, and Hugging Face's engine generates.
Each part has a time of its own and says so if it does not end within it:

* kernels: the tests of the FastHSIC kernels on this device
* step: an update at completions of 12,000 tokens, its MFU and the share of scores and masks (bench/step.py)
* attention: forward and backward of a layer by layout (bench/attention.py)
* run: train.py from its start through a checkpoint, SIGTERM and --resume to its end, the engine's tokens/s, and the
  peak memory beside the plan's

The tables go to bench/results/gpu-MACHINE.md. --small does all of it with a tiny shape on any machine, to try the
script: the tables are printed and nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together")
    parser.add_argument("--small", action="store_true", help="a tiny shape, on any machine; nothing is kept")
    return parser.parse_args()


if __name__ == "__main__" and not parse().small and not torch.cuda.is_available():  # before seconds of imports
    print("error: no NVIDIA GPU that PyTorch can use; make bench measures a machine without one", file=sys.stderr)
    sys.exit(2)

from aipo.config import load_config  # noqa: E402
from aipo.evaluation.results import markdown  # noqa: E402
from aipo.plan.planner import PUBLISHED, plan  # noqa: E402
from aipo.record.tracker import read_jsonl  # noqa: E402
from bench.machine import machine, slug  # noqa: E402
from tests.tiny import make_tiny, tiny_tokenizer  # noqa: E402

STOPPED = 3  # what train.py ends with after a signal
SHAPE = "Qwen/Qwen3-1.7B"
TINY = PUBLISHED[SHAPE] | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
RUN = [
    "data.train=embedded:chain_sum",
    "data.validation=embedded:chain_sum",
    "rollout.engine=hf",
    "advantage.drop_constant_groups=none",  # random weights never answer rightly: all groups are constant
    "curriculum.enabled=false",
    "validation.every=100",
    "validation.questions=4",
    "validation.samples=1",
    "validation.watch=[]",  # no benchmark lies there
    "checkpoint.every=100",  # it is SIGTERM that asks for one
    "tracking.wandb=disabled",
    "name=gpu",
]
LARGE_RUN = [
    "data.max_prompt_tokens=256",
    "rollout.questions_per_step=8",  # 64 rows
    "rollout.max_tokens=96",
    "reward.overlong_buffer=32",
    "loss.kl_beta=0",
    "optim.steps=3",
]


class NotDone(Exception):
    """Why a part has no result."""


class Job:
    """A process with children, ended with all of them at a deadline (``time.monotonic``)."""

    def __init__(self, command: list[str], log: Path, deadline: float) -> None:
        self.log, self.deadline = log, deadline
        with log.open("a") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, until: Callable[[], bool] = lambda: False, code: int = 0) -> None:
        """Until it has ended with ``code`` or ``until`` holds; raises :class:`NotDone` for anything else."""
        while self.process.poll() is None and not until():
            if time.monotonic() > self.deadline:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                raise NotDone("not done in its time")
            time.sleep(0.1)
        if self.process.poll() not in (None, code):
            print(self.log.read_text()[-4000:], file=sys.stderr)
            raise NotDone(f"ended with {self.process.returncode}: {self.log.read_text().strip().splitlines()[-1]}")


def kernels(work: Path, deadline: float, *, small: bool) -> str:
    log = work / "kernels.log"
    Job([sys.executable, "-m", "pytest", "-vv", "tests/test_mi_kernels.py"], log, deadline).wait()
    return f"## Kernels\n\n`tests/test_mi_kernels.py`: {log.read_text().strip().splitlines()[-1].strip('= ')}\n"


def script(name: str, arguments: list[str], work: Path, deadline: float) -> str:
    """The table that bench/NAME.py writes, as a section."""
    if not (ROOT / "bench" / f"{name}.py").exists():
        raise NotDone(f"there is no bench/{name}.py")
    out = work / f"{name}.md"
    Job([sys.executable, f"bench/{name}.py", *arguments, "--out", str(out)], work / f"{name}.log", deadline).wait()
    return "#" + out.read_text()


def step(work: Path, deadline: float, *, small: bool) -> str:
    size = ["--model", json.dumps(TINY)] if small else ["--scale", "60", "--micro-tokens", "12288", "--repeats", "2"]
    variants = ["--variants", "aipo,aipo-padded", "--attention", "sdpa"]  # shared prompts take no other
    return script("step", ["--quick", "--random", "--checkpointing", *variants, *size], work, deadline)


def attention(work: Path, deadline: float, *, small: bool) -> str:
    return script("attention", ["--cases", "2x64", "--repeats", "1"] if small else [], work, deadline)


def make_model(folder: Path) -> None:
    """Random weights of the shape, drawn on the device, with the tokenizer of the tests."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.for_model(**PUBLISHED[SHAPE], **ends)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(work: Path, deadline: float, *, small: bool) -> str:
    model, log, folder = work / "model", work / "run.log", work / "runs" / "gpu"
    make: Callable[..., Any] = make_tiny if small else make_model
    process = multiprocessing.get_context("spawn").Process(target=make, args=(model,))  # leaves nothing on the device
    process.start()
    process.join()
    if process.exitcode:
        raise NotDone(f"making the model ended with {process.exitcode}")
    name = "tiny.yaml" if small else "qwen3_1.7b.yaml"
    size = ["sharding.zero_stage=0"] if small else LARGE_RUN
    overrides = [f"model.path={model}", f"runs={work / 'runs'}", *RUN, *size]
    command = [sys.executable, "train.py", "--config", name, *overrides, "--resume", "auto"]

    def steps() -> list[dict[str, Any]]:
        lines = read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
        return [line for line in lines if line["step"]]

    begun = time.monotonic()
    job = Job(command, log, deadline)
    job.wait(lambda: bool(steps()))
    first = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    job.wait(code=STOPPED)
    stopped, before = time.monotonic(), len(steps())
    if not list((folder / "checkpoints").glob("*")):
        raise NotDone("SIGTERM left no checkpoint")
    Job(command, log, deadline).wait()
    ended, lines = time.monotonic(), steps()
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)) or len(lines) <= before:
        raise NotDone(f"the resumed run has the steps {[line['step'] for line in lines]} after {before}")
    last, config = lines[-1], load_config(name, overrides)
    peaks = json.loads((folder / "summary.json").read_text())["peak_memory_bytes"]
    where = max(peaks, key=lambda key: (key != "host", peaks[key]))  # the device's, on a CPU the host's
    planned = plan(config, 1)
    phase = max(planned.phases, key=planned.peak)
    cells = [
        ["start to the end of step 1", f"{first - begun:.0f} s"],
        ["SIGTERM to the end, with a checkpoint", f"{stopped - first:.0f} s, after step {before}"],
        ["--resume to the end of the run", f"{ended - stopped:.0f} s, steps {before + 1} to {len(lines)}"],
        *([key.removeprefix("time/"), f"{value:.2f}"] for key, value in last.items() if key.startswith("time/")),
        ["generation, tokens/s", f"{last['rollout/tokens'] / last['time/rollout_s']:,.0f}"],
        [f"peak memory ({where}), GiB", f"{peaks[where] / 2**30:.2f}"],
        [f"planned ({phase}), GiB", f"{planned.peak(phase) / 2**30:.2f}"],
    ]
    about = f"`train.py --config {name}`, engine {config.rollout.engine}, ZeRO-{config.sharding.zero_stage}; last step."
    return f"## A run\n\n{about}\n\n{markdown(['what', 'value'], cells)}"


# name -> what measures it, and its share of the time; what one leaves is for those behind it
PARTS: dict[str, tuple[Callable[..., str], float]] = {
    "kernels": (kernels, 0.08),
    "step": (step, 0.27),
    "attention": (attention, 0.1),
    "run": (run, 0.55),
}


def main() -> int:
    arguments = parse()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    text = [f"# One GPU\n\n{machine()}; {versions}. Written by bench/gpu.sh.\n"]
    missing, begun, shares = 0, time.monotonic(), 0.0
    for name, (part, share) in PARTS.items():
        start, shares = time.monotonic(), shares + share
        deadline = begun + shares * arguments.seconds
        print(f"{name}: at most {deadline - start:.0f} s", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as work:
            try:
                text.append(part(Path(work), deadline, small=arguments.small))
            except NotDone as reason:
                missing += 1
                text.append(f"## Skipped: {name}\n\n{reason} ({deadline - start:.0f} s).\n")
                print(f"{name} skipped: {reason}", file=sys.stderr)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    result = "\n".join(text)
    print(result)
    if not arguments.small:
        target = ROOT / "bench" / "results" / f"gpu-{slug()}.md"
        target.write_text(result)
        print(f"written: {target.relative_to(ROOT)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
