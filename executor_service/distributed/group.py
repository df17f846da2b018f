"""The ranks of an executor as a group: what they settle at the start, and the collectives of the layers."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from executor_service.distributed.placement import Placement
from executor_service.layers.parallel import TensorParallel
from executor_service.weights.errors import UnfitSettings

if TYPE_CHECKING:
    from kernels.gpu.peer_exchange import PeerMemory


class RankGroup:
    """This process and its peers, over torch.distributed; one without peers never touches it."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        """Meet the others; blocks until all are there. device: where this rank computes, its local rank's if a GPU.

        Raises: UnfitSettings, where the ranks have different GPUs.
        """
        self.placement = placement
        self._gpus = None
        if placement.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            if device.type == "cuda":
                from executor_service.distributed.gpu_collectives import GpuCollectives  # needs triton

                self.require_same("GPU", torch.cuda.get_device_name(device))
                self._gpus = GpuCollectives(placement, device, self.least)

    def least(self, value: int) -> int:
        """The smallest of what the ranks call with."""
        if self.placement.size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values)

    def require_same(self, what: str, value: object) -> None:
        """Raises: UnfitSettings, on every rank, where `value` is not the same on all of them."""
        if self.placement.size == 1:
            return
        values: list[object] = [None] * self.placement.size
        dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise UnfitSettings(f"the ranks differ in {what}: {values}")

    def tensor_parallel(self) -> TensorParallel:
        """This rank's place in the model, with collectives over the memory where it computes."""
        if self.placement.size == 1:
            return TensorParallel()
        rank, size = self.placement.rank, self.placement.size
        if self._gpus is None:
            return TensorParallel(rank, size, _all_reduce, all_gather=_all_gather)
        return TensorParallel(rank, size, self._gpus.all_reduce, self._gpus.all_reduce_norm, self._gpus.all_gather)

    def peer_memory(self, num_words: int) -> "PeerMemory | None":
        """Memory that the GPUs of all ranks address; None, on every rank, where they cannot or there is one rank."""
        return None if self._gpus is None else self._gpus.allocate(num_words)


def _all_reduce(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


def _all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=1)
