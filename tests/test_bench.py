"""The parts of bench/ that decide something: what gpu.sh starts, what a comparison calls a difference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from aipo.config import load_config
from bench import step
from bench.compare import distinguishable

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"

STAND_IN = """#!/bin/bash
if [ "$1" = -c ]; then
    case "$2" in *vllm*) echo hf ;; *slug*) echo stand-in ;; esac
else
    printf '%s\\n' "$*" >> "$SEEN"
    for word in "$@"; do
        case "$word" in runs=*) mkdir -p "${word#runs=}/gpu"; touch "${word#runs=}/gpu/summary.md" ;; esac
    done
fi
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(["bash", SCRIPT], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no NVIDIA GPU")


def test_what_it_starts_takes_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, seen = tmp_path / "python", tmp_path / "seen"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    copy = tmp_path / "repository" / "bench" / "gpu.sh"  # it writes beside itself
    copy.parent.mkdir(parents=True)
    copy.write_bytes(SCRIPT.read_bytes())
    environment = os.environ | {"PYTHON": str(python), "SEEN": str(seen)}
    subprocess.run(["bash", copy, "--trl"], env=environment, check=True)
    assert (copy.parent / "results" / "train-stand-in.md").exists()

    started = [line.split() for line in seen.read_text().splitlines()]
    assert [line[0] for line in started] == ["-m", "bench/step.py", "bench/head.py", "bench/mi.py", "train.py"]
    assert all((ROOT / word).exists() for line in started for word in line if word.endswith(".py"))
    monkeypatch.setattr(sys, "argv", started[1])
    assert (step.parse().rounds, step.parse().trl) == (2, ROOT / ".venv-trl")
    parsed = train.parse(started[4][1:])
    config = load_config(parsed.config, parsed.overrides)
    assert (config.rollout.engine, config.optim.steps) == ("hf", 10)


def test_a_difference_is_one_that_every_seed_shows() -> None:
    """Seeds start 20 points apart, which only pairing takes out; "noisy" is better on average, but not always."""
    runs = {
        "random_mask": ([0, 1, 2], [0.20, 0.30, 0.40]),
        "better": ([2, 0, 1], [0.50, 0.31, 0.405]),
        "noisy": ([0, 1, 2], [0.35, 0.28, 0.55]),
        "once": ([0], [0.9]),
    }
    found = {name: {"seeds": seeds, "after": after} for name, (seeds, after) in runs.items()}
    text = distinguishable(found)
    assert "correction for 2 comparisons" in text
    assert "differ from it: better (+10.5 points" in text
    assert "noisy" not in text
    assert "none differs" in distinguishable({k: v for k, v in found.items() if k != "better"})
    assert "nothing can be told apart" in distinguishable({k: v for k, v in found.items() if k != "random_mask"})
