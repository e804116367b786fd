"""Ranks of one run. ``torch.distributed`` is the one source of rank and world size.

(On CPU ranks Accelerate's own state says "process 0 of 1" everywhere, so it is not asked.)
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from aipo.errors import TrainingError, UserError, tell_launcher
from aipo.threads import cpu_threads

T = TypeVar("T")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""of an OSError: full disk, spent quota, limit of a file's size, disk that became read-only"""


def launch(work: Callable[[torch.device], int | None]) -> int:
    """Join the process group, do this rank's ``work``, leave; gives ``work``'s exit code, or that of what it raised."""
    try:
        code = work(start())
        stop()
        return code or 0
    except (UserError, TrainingError) as error:
        return fail(error)
    except OSError as error:
        if error.errno not in NO_ROOM:
            if world_size() > 1:
                fail(error)
            raise
        where = f": {error.filename}" if error.filename else ""
        return fail(
            TrainingError(
                f"nothing could be written ({error.strerror}{where}): make room, then start the same command again, "
                "train.py with --resume auto; checkpoints that are complete stay so"
            )
        )
    except Exception as error:
        if world_size() > 1:
            fail(error)
        raise


def start() -> torch.device:
    """Join the process group; a bare single process gets the environment that a launcher would have set."""
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("WORLD_SIZE is set without RANK and MASTER_ADDR: start with accelerate launch or torchrun")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(cpu_threads())  # also where torch was imported before the environment was settled
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(
                f"rank {local} of this machine has no GPU: {torch.cuda.device_count()} there, start as many"
            )
        torch.cuda.set_device(local)
        refuse_old_gpu(local)
        device = torch.device("cuda", local)
        # a bound device makes every later group an NCCL split, which one rank alone has no use for
        bound = device if int(os.environ["WORLD_SIZE"]) > 1 else None
        # nor may a group of some ranks wait in the store for others that are in its split
        os.environ["TORCH_DIST_INIT_BARRIER"] = "0"
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=bound)
    else:
        refuse_unusable_gpu()
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    if world_size() > 1:
        global _TELLS
        _TELLS = _store()
        threading.Thread(target=_end_with_others, args=[_store()], daemon=True).start()
    return device


def refuse_unusable_gpu() -> None:
    """UserError where nvidia-smi shows a GPU that torch cannot use, unless CUDA_VISIBLE_DEVICES hides all of them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1") or not shutil.which("nvidia-smi"):
        return
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        seen = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise UserError("nvidia-smi does not answer: the driver hangs; CUDA_VISIBLE_DEVICES= runs on the CPU") from None
    if seen.returncode == 0 and seen.stdout.strip():
        name, _, driver = seen.stdout.splitlines()[0].rpartition(", ")
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise UserError(
            f"nvidia-smi shows a GPU ({name}, driver {driver}) that PyTorch cannot use: torch {torch.__version__} "
            f"{built}: update the driver or install the other torch; CUDA_VISIBLE_DEVICES= runs on the CPU"
        )


def refuse_old_gpu(local: int) -> None:
    """UserError where torch has no code for a GPU that is older than all that it was built for."""
    own = torch.cuda.get_device_capability(local)
    names = [name.partition("_")[2] for name in torch.cuda.get_arch_list()]  # sm_90a, compute_120; of AMD gfx942
    built = [divmod(int("".join(filter(str.isdigit, name))), 10) for name in names if name]
    if built and own < min(built):
        oldest = ".".join(map(str, min(built)))
        raise UserError(
            f"{torch.cuda.get_device_name(local)} has compute capability {own[0]}.{own[1]}, and torch "
            f"{torch.__version__} is built for {oldest} and newer: install a torch that has it, or run on the CPU with "
            "CUDA_VISIBLE_DEVICES="
        )


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor: Tensor, op: str = "sum") -> Tensor:
    """Sum (or ``max``) over ranks, of a tensor on any device; returns it on the same one."""
    if world_size() == 1:
        return tensor
    on_cpu = tensor.detach().cpu().contiguous()
    dist.all_reduce(on_cpu, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=_cpu_group())
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


def gather_objects(value: Any, *, beside: bool = False) -> list[Any]:
    """Every rank's value, in order of rank.

    Args:
        beside: for a thread that works beside the training, whose collectives these then cannot meet;
            :func:`open_beside` comes first.
    """
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value, group=_BESIDE if beside else _cpu_group())
    return out


def open_beside() -> None:
    """Make what :func:`gather_objects` with ``beside`` speaks through; a collective of the main threads."""
    global _BESIDE
    if world_size() > 1 and _BESIDE is None:
        _BESIDE = _new_group()


def first_problem(error: Exception | None) -> str | None:
    """What went wrong on the first rank where something did, the same on every rank; None if all went well.

    A rank with an error gives the others as long as :func:`at_most` says: they may wait for it in another collective.
    """
    mine = None if error is None else f"{type(error).__name__}: {error}" + (f" (rank {rank()})" if rank() else "")
    with nullcontext() if error is None else at_most(20, error):
        problems = gather_objects(mine)
    return next((problem for problem in problems if problem), None)


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
_BESIDE: Any = None


def _cpu_group() -> Any:
    global _GLOO
    if _GLOO is None:
        _GLOO = _new_group()
    return _GLOO


def _new_group() -> Any:
    """Objects travel over gloo, not through GPU memory."""
    # a rank may wait for hours, for another's evaluation or rank 0's checkpoint; a failure ends the wait
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def stop() -> None:
    """Leave the process group, all ranks together: one that goes early would take the others' connection with it."""
    global _GLOO, _BESIDE
    if dist.is_initialized():
        dist.barrier(group=_cpu_group() if world_size() > 1 else None)
        _GLOO = _BESIDE = None
        dist.destroy_process_group()


_CLAIMED, _FAILED = "aipo/claimed", "aipo/failed"  # keys in the store of the process group
_TELLS: Any = None  # that store, for :func:`fail`: a connection begun then would wait half an hour for a killed rank 0


def _store() -> Any:
    """That store, on a connection of its own: who waits on a connection keeps it from others."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def fail(error: BaseException) -> int:
    """Say what went wrong; gives the exit code, 2 for a UserError.

    With several ranks it does not return. The first that fails speaks and ends, the others end silently with it: they
    may be in a collective for which it never comes, and what they would say only follows from its error.
    """
    known, code = isinstance(error, UserError | TrainingError), 2 if isinstance(error, UserError) else 1
    text = f"error: {error}" if known else "".join(traceback.format_exception(error)).rstrip()
    several = world_size() > 1
    if several:
        text = f"rank {rank()}: {text}"
        try:
            if _TELLS.add(_CLAIMED, 1) > 1:
                time.sleep(60)  # the thread that follows the other's failure is faster
                os._exit(code)
        except dist.DistError:  # launched without torchrun, the store is in rank 0
            text = f"{text}\nrank {rank()}: rank 0 ended without a word: was it killed, for its memory?"
        tell_launcher(text)
    with suppress(OSError):  # where nobody reads any more, the others must still be told
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)
    if several:
        with suppress(dist.DistError):
            _TELLS.set(_FAILED, text)
        time.sleep(0.5)  # the others are silent before their connections break
        os._exit(code)  # no destructor that waits for them
    return code


@contextmanager
def at_most(seconds: float, error: BaseException) -> Iterator[None]:
    """What a rank still does after ``error``. If others keep it longer than that, it fails then and there."""
    timer = threading.Timer(seconds, fail, [error])
    timer.daemon = True
    if world_size() > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_with_others(store: Any) -> None:
    """On a thread: end this rank when another has failed."""
    with suppress(dist.DistError):  # at the end of a run the store may go before this rank does
        store.wait([_FAILED], timedelta(days=365))
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # bars hide the cursor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        time.sleep(2)  # the launcher takes the rank that ends first for the cause
        os._exit(1)
