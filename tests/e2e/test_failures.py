"""What a run needs to start, what one that died leaves, and how several ranks end when one of them fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aipo.record.tracker import has_begun
from tests import processes
from tests.e2e.launch import ROOT, hidden, torchrun
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e

ACCELERATE = [*hidden(2), "accelerate", "launch", "--use_deepspeed", "--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"question": f"{a} + {b}", "answer": str((a + b) % 10)} for a in range(3) for b in range(4)]
    data = folder / "digits.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model.path": make_tiny(folder / "model", scale=0.15), "data.train": data, "data.validation": data}
    keys |= {"rollout.engine": "hf", "model.dtype": "float32", "rollout.max_tokens": 8, "curriculum.enabled": False}
    return ["--config", "tiny.yaml", "optim.steps=1", *(f"{key}={value}" for key, value in keys.items())]


def start(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Both streams in one, as on a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return processes.run(["/bin/sh", "-c", 'exec "$0" "$@" 2>&1', *command], cwd=ROOT, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton compiles its kernels")
@pytest.mark.parametrize(("engine", "offload"), [("hf", True), ("vllm", False)])
def test_nothing_is_compiled(arguments: list[str], engine: str, offload: bool, tmp_path: Path) -> None:
    """No compiler, no ninja, and the lock of a compilation that was killed: a step is trained, by a bare python."""
    extensions = tmp_path / "extensions"
    (extensions / "deepspeed_shm_comm").mkdir(parents=True)
    (extensions / "deepspeed_shm_comm" / "lock").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "lscpu").symlink_to(str(shutil.which("lscpu")))  # vLLM asks it for the cores
    more = [f"runs={tmp_path}", "name=run", f"sharding.offload_optimizer={offload}", f"rollout.engine={engine}"]
    done = start(
        [sys.executable, "train.py", *arguments, *more],
        PATH=str(tmp_path / "bin"),
        TORCH_EXTENSIONS_DIR=str(extensions),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert [path.name for path in extensions.rglob("*")] == ["deepspeed_shm_comm", "lock"]
    assert not [path for path in (tmp_path / "inductor").rglob("*") if path.is_file()]
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()] == [0, 1]


@pytest.mark.parametrize(
    ("where", "launcher"),
    [("forward", ACCELERATE), ("reward", torchrun(2)), ("save", torchrun(2))],
    ids=["forward", "reward", "save"],
)
def test_a_rank_that_fails_ends_all(arguments: list[str], where: str, launcher: list[str], tmp_path: Path) -> None:
    """Rank 0 waits in a collective for which rank 1 never comes, and the launcher, as on a cluster, for rank 0."""
    worker = str(Path(__file__).with_name("failing_worker.py"))
    run = [f"runs={tmp_path}", "name=run"]
    done = start([*launcher, worker, where, *arguments, *run], TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3500")
    assert done.returncode == 1, done.stdout[-5000:]
    assert done.stdout.rstrip("=\n").endswith(f"RuntimeError: broken in the {where}"), done.stdout[-5000:]
    assert "rank 1: Traceback" in done.stdout
    assert "rank 0: " not in done.stdout  # nor what it would say of a lost connection
    assert "Connection" not in done.stdout
    # the same command starts anew where no step was trained
    assert has_begun(tmp_path / "run") == (where == "save")
