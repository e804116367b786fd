"""The wire from a trainer to its vLLM servers: one group of the trainer's rank 0 and all vLLM workers, in which every
weight is broadcast.

On GPUs the group is vLLM's own, over NCCL. vLLM has nothing for machines without, so this file registers ``gloo``
beside it, with the same messages. vLLM's workers import it because of ``--worker-extension-cls``
(aipo/rollout/server.py).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, trainer_init
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.utils.network_utils import get_open_port

TIMEOUT = timedelta(minutes=5)


class Group(Protocol):
    """Rank 0's end: ``port`` is where the others find it; it waits for them in :meth:`join`."""

    port: int

    def __init__(self, address: str, world_size: int) -> None: ...

    def join(self) -> None: ...

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Send tensors to all; they may change once it returns."""
        ...

    def destroy(self) -> None: ...


class NcclGroup:
    """Rank 0's device is GPU 0, which is also the one of a new thread."""

    def __init__(self, address: str, world_size: int) -> None:
        self.port = get_open_port()
        self._info = {"master_address": address, "master_port": self.port, "world_size": world_size}

    def join(self) -> None:
        self._group = trainer_init(self._info)

    def broadcast(self, tensors: list[Tensor]) -> None:
        stream = torch.cuda.Stream()  # what waits for a server that is gone must not hold up the training's stream
        stream.wait_stream(torch.cuda.current_stream())
        for tensor in tensors:
            self._group.broadcast(tensor, src=0, stream=stream)
        stream.synchronize()

    def destroy(self) -> None:
        self._group.destroy()


class GlooGroup:
    """An end of the group over gloo, of rank 0 (which opens ``port`` 0, any free one) or of a worker."""

    def __init__(self, address: str, world_size: int, *, rank: int = 0, port: int = 0) -> None:
        self._store = dist.TCPStore(
            address, port, world_size, is_master=rank == 0, timeout=TIMEOUT, wait_for_workers=False
        )
        self.port, self._place = self._store.port, (rank, world_size)

    def join(self) -> None:
        self._group: Any = dist.ProcessGroupGloo(self._store, *self._place, TIMEOUT)

    def broadcast(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._group.broadcast([tensor.cpu()], dist.BroadcastOptions()).wait()  # of rank 0's

    def destroy(self) -> None:
        self._group.shutdown()


GROUPS: dict[str, type[Group]] = {"nccl": NcclGroup, "gloo": GlooGroup}


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """The worker's end. What comes before and after the weights, vLLM's layer-wise reload, is its NCCL engine's."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        assert init_info.master_address is not None
        assert init_info.master_port is not None
        self._link = GlooGroup(
            init_info.master_address,
            init_info.world_size,
            rank=init_info.rank_offset + worker,
            port=init_info.master_port,
        )
        self._link.join()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # vLLM's would wait for an accelerator

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self._link.broadcast([weight])
            self.model.load_weights([(name, weight)])  # type: ignore[operator]  # kept until its layer is complete

    def shutdown(self) -> None:
        if hasattr(self, "_link"):
            self._link.destroy()
            del self._link


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)


class Registered:
    """Naming this class as vLLM's worker extension makes its workers import this file; it adds nothing to them."""
