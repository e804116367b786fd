"""What docs/scaling.md and configs/cluster say: its tables are the plan's, its commands can be parsed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import train
from aipo.config import CONFIG_FOLDER, load_config
from aipo.plan.memory import GIB, kv_token_bytes
from aipo.plan.planner import plan

DOCUMENT = (CONFIG_FOLDER.parent / "docs" / "scaling.md").read_text()
SCRIPT = CONFIG_FOLDER / "cluster" / "train.slurm"
RANKS = {"qwen3_1.7b.yaml": 8, "qwen3_4b.yaml": 8, "qwen3_8b.yaml": 8, "qwen3_32b.yaml": 32}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", RANKS)
def test_tables_are_the_plans(name: str) -> None:
    config = load_config(name)
    made = plan(config, RANKS[name], gpu_memory_gb=80)
    assert made.problems == []
    update, rollout = made.phases["update"], made.phases["rollout"]
    purposes = ["reference model", "gathered weights", "activations", "logits and head"]
    sizes = [update["weights"], update["gradients"] + update["optimizer"], *(update[p] for p in purposes)]
    cells = [f"{size / GIB:.1f}" for size in [*sizes, made.peak("update")]]
    assert f"| `{name}` | {RANKS[name]} | {' | '.join(cells)} |" in DOCUMENT
    held = rollout["KV cache"] // kv_token_bytes(made.precision.settle(config), made.model) // 12288
    sizes = [rollout["engine weights"], rollout["KV cache"], made.peak("rollout")]
    weights, cache, peak = (f"{size / GIB:.1f}" for size in sizes)
    row = re.search(rf"\| `{name}` \| {weights} \| {cache} \| {held} \| {peak} \| ([\d,]+) \|", DOCUMENT)
    assert row, f"{weights} | {cache} | {held} | {peak}"
    largest = int(row[1].replace(",", ""))

    def needed(tokens: int) -> int:
        return plan(load_config(name, [f"optim.micro_tokens={tokens}"]), RANKS[name], gpu_memory_gb=80).peak("update")

    assert needed(largest) <= 80 * GIB < needed(largest + 4096)


def test_a_server_leaves_the_training_gpus_to_the_training() -> None:
    made = plan(load_config("qwen3_32b.yaml", ["rollout.mode=server"]), 32, gpu_memory_gb=80)
    assert made.problems == []
    assert not {"engine weights", "KV cache"} & {purpose for phase in made.phases.values() for purpose in phase}


def launched(arguments: list[str]) -> None:
    """Accelerate and train.py both understand the command."""
    parsed = launch_command_parser().parse_args(arguments)
    assert parsed.multi_gpu
    assert (parsed.num_machines, parsed.num_processes) == (4, 32)
    assert parsed.training_script == "train.py"
    load_config(train.parse(parsed.training_script_args).config)


def test_the_documented_command_parses() -> None:
    (command,) = re.findall(r"^accelerate launch (--multi_gpu.*?)$\n```", DOCUMENT, re.M | re.S)
    launched(command.replace("\\\n", " ").split())


def test_the_slurm_script_starts_one_launcher_a_machine(tmp_path: Path) -> None:
    """Run with stand-ins for Slurm's commands and for Python; each machine's launcher writes down its arguments."""
    commands = {
        "scontrol": "echo host0; echo host1",
        "srun": 'shift; for i in 0 1 2 3; do SLURM_NODEID=$i "$@"; done',
        "python": 'shift 2; printf "%s\\n" "$@" > "launcher$SLURM_NODEID"; env > environment',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "SLURM_NNODES": "4",
        "SLURM_JOB_NODELIST": "host[0-3]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "NETWORK": "ib7",
        "SLURM_CPUS_PER_TASK": "96",
    }
    subprocess.run(["bash", str(SCRIPT), "qwen3_32b.yaml", "name=a b"], env=environment, check=True)
    for number in range(4):
        arguments = (tmp_path / f"launcher{number}").read_text().splitlines()
        assert arguments[arguments.index("--machine_rank") + 1] == str(number)
        assert arguments[arguments.index("--main_process_ip") + 1] == "host0"
        assert arguments[-5:] == ["--resume", "auto", "--config", "qwen3_32b.yaml", "name=a b"]
        launched(arguments)
    exported = (tmp_path / "environment").read_text().splitlines()
    assert {"NCCL_SOCKET_IFNAME=ib7", "GLOO_SOCKET_IFNAME=ib7", "SRUN_CPUS_PER_TASK=96"} <= set(exported)


def test_the_slurm_script_wants_a_config_and_is_clean() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage" in done.stderr
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)
