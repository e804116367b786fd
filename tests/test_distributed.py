"""aipo/distributed.py where ranks do not matter."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from aipo import distributed
from aipo.distributed import buckets
from aipo.errors import UserError, tell_launcher
from aipo.model.precision import this_device
from evaluate import spread
from tests import processes


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """As a launcher starts one of two ranks; what the process group is asked for, which is not made."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    groups: list[dict[str, Any]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: groups.append({"backend": backend, **more}))
    return groups


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_device_is_bound_where_there_are_others(
    launched: list[dict[str, Any]], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: ranks)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "refuse_old_gpu", lambda local: None)
    device = distributed.start()
    assert device == torch.device("cuda", 0)
    assert launched == [{"backend": "cpu:gloo,cuda:nccl", "device_id": device if ranks > 1 else None}]


def test_a_gpu_that_torch_cannot_use_is_an_error(
    launched: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    distributed.start()  # no nvidia-smi
    shown = tmp_path / "nvidia-smi"
    shown.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-80GB, 470.57.02'\n")
    shown.chmod(0o755)
    for look in (distributed.start, this_device, partial(spread, 2)):
        with pytest.raises(UserError, match=r"A100.*driver 470\.57\.02.*update the driver"):
            look()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # meant
    distributed.start()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    shown.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    distributed.start()
    assert launched == [{"backend": "gloo"}] * 3

    def hangs(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 60)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(UserError, match="nvidia-smi does not answer"):
        distributed.start()


@pytest.mark.parametrize(("own", "fit"), [((7, 0), False), ((7, 5), True), ((9, 0), True), ((12, 0), True)])
def test_a_gpu_that_torch_has_no_code_for_is_an_error(
    own: tuple[int, int], fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda local: own)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda local: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_100", "compute_120"])
    if fit:
        distributed.refuse_old_gpu(0)
    else:
        with pytest.raises(UserError, match=r"Tesla V100 has compute capability 7\.0, and torch .* built for 7\.5 and"):
            distributed.refuse_old_gpu(0)


def test_a_rank_without_a_gpu_is_an_error(launched: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="rank 1 of this machine has no GPU: 1 there"):
        distributed.start()
    assert not launched


def test_a_full_disk_is_one_line(
    launched: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "start", lambda: torch.device("cpu"))

    def write(number: int) -> None:
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    assert distributed.launch(lambda device: write(errno.ENOSPC)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: nothing could be written (No space left on device: metrics.jsonl): make room, then")
    with pytest.raises(ConnectionError):  # of which nothing is known
        distributed.launch(lambda device: write(errno.ECONNRESET))


@given(st.lists(st.integers(0, 9)), st.integers(1, 12))
def test_buckets_keep_order_and_size(sizes: list[int], limit: int) -> None:
    items = list(enumerate(sizes))
    cut = list(buckets(iter(items), limit, lambda item: item[1]))
    assert [item for bucket in cut for item in bucket] == items
    assert all(len(bucket) == 1 or sum(n for _, n in bucket) <= limit for bucket in cut)
    for first, second in pairwise(cut):  # none that the next could have joined
        assert sum(n for _, n in first) + second[0][1] > limit


KILLED = """
import os, signal, torch, torch.distributed as dist
from aipo import distributed

def work(device):
    dist.barrier()
    if distributed.rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))

distributed.launch(work)
"""


@pytest.mark.slow
def test_a_killed_rank_0_ends_the_others() -> None:
    """It takes the store with it where no torchrun holds that, and a connection to it would wait for half an hour."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    place |= {"CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": "2"}
    first, second = ({**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank} for rank in "01")
    killed = subprocess.Popen([sys.executable, "-c", KILLED], env=first)
    done = processes.run([sys.executable, "-c", KILLED], env=second)
    assert killed.wait() == -signal.SIGKILL
    assert done.returncode == 1
    assert "rank 1: rank 0 ended without a word: was it killed" in (done.stdout or "") + (done.stderr or "")


def test_the_launcher_is_told_unless_its_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_launcher("error: optim.lrr")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "error: optim.lrr"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full")
    tell_launcher("error: no space")  # whose own words are still to be printed
