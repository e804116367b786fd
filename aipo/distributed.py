"""Ranks of one run. ``torch.distributed`` is the one source of rank and world size.

(On CPU ranks Accelerate's own state says "process 0 of 1" everywhere, so it is not asked.)
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from aipo.errors import UserError
from aipo.threads import cpu_threads

T = TypeVar("T")


def start() -> torch.device:
    """Join the process group; a bare single process gets the environment that a launcher would have set."""
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("WORLD_SIZE is set without RANK and MASTER_ADDR: start with accelerate launch or torchrun")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    torch.set_num_threads(cpu_threads())  # also where torch was imported before the environment was settled
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    """Sum (or ``max``) over ranks, of a tensor on any device; returns it on the same one."""
    if world_size() == 1:
        return tensor
    on_cpu = tensor.detach().cpu().contiguous()
    dist.all_reduce(on_cpu, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return on_cpu.to(tensor.device)


def agree_max(value: int) -> int:
    """The largest of all ranks' values."""
    return int(all_reduce(torch.tensor(value, dtype=torch.long), "max"))


def all_true(value: bool) -> bool:
    """True on every rank if it is true on all."""
    return agree_max(int(not value)) == 0


def gather(tensor: Tensor) -> Tensor:
    """1-D tensors of all ranks, in order of rank, of possibly different lengths."""
    if world_size() == 1:
        return tensor
    parts = gather_objects(tensor.detach().cpu())
    return torch.cat(parts).to(tensor.device)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in order of rank."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value, group=_cpu_group())
    return out


def on_first(action: Callable[[], T]) -> T:
    """Run on rank 0 and share what it gave, or raised as UserError, with all ranks."""
    outcome: tuple[Any, str | None] = (None, None)
    if rank() == 0:
        try:
            outcome = (action(), None)
        except UserError as error:
            outcome = (None, str(error))
    value, problem = gather_objects(outcome)[0]
    if problem is not None:
        raise UserError(problem)
    return value


def buckets(items: Iterable[T], size: int, size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive items, as many as have up to ``size`` together; a larger one comes alone."""
    bucket: list[T] = []
    held = 0
    for item in items:
        if bucket and held + size_of(item) > size:
            yield bucket
            bucket, held = [], 0
        bucket.append(item)
        held += size_of(item)
    if bucket:
        yield bucket


_GLOO: Any = None


def _cpu_group() -> Any:
    """Objects travel over gloo, not through GPU memory."""
    global _GLOO
    if _GLOO is None:
        # a rank that has done its share of an evaluation may wait for hours; launchers notice ranks that died
        _GLOO = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return _GLOO


def stop() -> None:
    """Leave the process group, all ranks together: one that goes early would take the others' connection with it."""
    global _GLOO
    if dist.is_initialized():
        dist.barrier(group=_cpu_group() if world_size() > 1 else None)
        _GLOO = None
        dist.destroy_process_group()
