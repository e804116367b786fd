"""Start train.py and evaluate.py as a user would, in a process of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes

ROOT = Path(__file__).parents[2]
PYTHON, ACCELERATE = [sys.executable], ["accelerate", "launch"]  # the second imports torch for itself: seconds


def few_gpus(ranks: int) -> bool:
    """Whether there are GPUs, but not one for each rank."""
    return 0 < torch.cuda.device_count() < ranks


two_vllm = pytest.mark.skipif(few_gpus(2), reason="vLLM for GPUs wants one for each of two ranks")


def hidden(ranks: int) -> list[str]:
    """What a command begins with so that it goes to the CPU where there are too few GPUs."""
    return ["env", "CUDA_VISIBLE_DEVICES="] if few_gpus(ranks) else []


def torchrun(ranks: int) -> list[str]:
    """On a port of its own, so that two can go on at once."""
    return [*hidden(ranks), sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def command(*arguments: str, ranks: int = 1, launcher: list[str] = PYTHON) -> list[str]:
    """``launcher``: of one rank; torchrun starts more."""
    return [*(launcher if ranks == 1 else torchrun(ranks)), "train.py", *arguments]


def train(*arguments: str, ranks: int = 1, launcher: list[str] = PYTHON, expect: int = 0) -> str:
    """Run to the end; returns what it printed."""
    return _run(command(*arguments, ranks=ranks, launcher=launcher), expect)


def evaluation(*arguments: str, ranks: int = 1) -> list[str]:
    return [*(torchrun(ranks) if ranks > 1 else [sys.executable]), "evaluate.py", *arguments]


def evaluate(*arguments: str, ranks: int = 1, expect: int = 0) -> str:
    """Run to the end; returns what it printed."""
    return _run(evaluation(*arguments, ranks=ranks), expect)


def _run(command: list[str], expect: int) -> str:
    done = processes.run(command, cwd=ROOT)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def metrics(folder: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, without what no two runs share: times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if timed:
        return lines
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "speed/"))} for line in lines]
