"""The collectives of a group of GPUs: NCCL, and the exchange through each other's memory where ranks share a host.

NVLink multicast is never asked for.
"""

import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory

from executor_service.distributed.placement import Placement
from kernels.gpu.peer_all_reduce import AllReduceLimits, PeerAllReduce
from kernels.gpu.peer_exchange import PeerMemory

TABLE = Path(__file__).parent / "all_reduce_table.json"  # benchmarks/gpu/all_reduce.py writes it
_DEFAULT_LIMITS = AllReduceLimits(one_shot=512 << 10, norm_one_shot=512 << 10, norm_two_shot=0)

log = logging.getLogger(__name__)


def table_key(device_name: str, num_ranks: int) -> str:
    """Of the table."""
    return f"{device_name} x{num_ranks}"


def all_reduce_limits(device_name: str, num_ranks: int) -> AllReduceLimits:
    """What is summed through peer memory; the table is committed, so that ranks never differ."""
    entry = _table().get(table_key(device_name, num_ranks))
    return AllReduceLimits(**entry) if entry else _DEFAULT_LIMITS


@functools.cache
def _table() -> dict[str, dict[str, int]]:
    return json.loads(TABLE.read_text())


class GpuCollectives:
    """What the ranks do together on their devices. On all of them the same calls are made in the same order."""

    def __init__(self, placement: Placement, device: torch.device, least: Callable[[int], int]) -> None:
        """The ranks have met, and each uses the GPU of its local rank. least: of what they call with, on the host."""
        self._placement = placement
        self._device = device
        self._least = least
        self._allocations: list[Any] = []  # what other ranks address lives as long as this
        self._through_peers: PeerAllReduce | None = None
        dist.all_reduce(torch.zeros(1, device=device))  # connects, which must not happen in a capture
        torch.cuda.current_stream().synchronize()
        self.has_peer_memory = bool(least(int(_reaches_all(placement, device))))
        limits = all_reduce_limits(torch.cuda.get_device_name(device), placement.size)
        if memory := self.allocate(PeerAllReduce.num_words(placement.size, limits)):
            self._through_peers = PeerAllReduce.make(memory, limits)
            log.info("all-reduce: through peer memory up to %d KiB, NCCL above", limits.most >> 10)
            torch.cuda.current_stream().synchronize()  # whoever calls later may do so on another stream
        else:
            log.warning("all-reduce: NCCL alone, since the ranks do not reach each other's memory")

    def allocate(self, num_words: int) -> PeerMemory | None:
        """Memory that all ranks address, each the same amount; None, on every rank, where there is none."""
        memory = None
        if self.has_peer_memory:
            try:
                memory = self._allocate(num_words)
            except RuntimeError as error:
                log.warning("no memory that the ranks share: %s", error)
            # Also: no rank writes before all have zeroed theirs.
            self.has_peer_memory = bool(self._least(int(memory is not None)))
        return memory if self.has_peer_memory else None

    def _allocate(self, num_words: int) -> PeerMemory:
        # Not by torch.distributed._symmetric_memory.empty, which cuts tensors out of a pool.
        words = _SymmetricMemory.empty_strided_p2p((num_words,), (1,), torch.int64, self._device)
        words.zero_()
        torch.cuda.current_stream().synchronize()
        assert dist.group.WORLD is not None
        handle = _SymmetricMemory.rendezvous(words, dist.group.WORLD.group_name)
        self._allocations.append((words, handle))
        addresses = list(handle.buffer_ptrs)
        rank = self._placement.rank
        assert addresses[rank] == words.data_ptr()
        assert not any(address % 16 for address in addresses)
        return PeerMemory(rank, torch.tensor(addresses, dtype=torch.int64, device=self._device), num_words)

    def all_reduce_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor | None:
        """See AllReduceNorm of layers/parallel.py."""
        if self._through_peers is None or not self._through_peers.takes_rows(x):
            return None
        return self._through_peers.all_reduce_norm(x, residual, weight, eps)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place, the same bits on all of them."""
        if self._through_peers is not None and self._through_peers.takes(x):
            return self._through_peers.all_reduce(x)
        dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, k], the same on all ranks -> [n, k * ranks], in rank order; every dtype."""
        gathered = x.new_empty((self._placement.size, *x.shape))
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered.transpose(0, 1).flatten(1)


def _reaches_all(placement: Placement, device: torch.device) -> bool:
    """Whether this rank's GPU addresses the memory of all others."""
    if placement.local_size != placement.size or os.environ.get("NCCL_P2P_DISABLE") == "1":
        return False
    others = (index for index in range(placement.size) if index != device.index)
    return all(torch.cuda.can_device_access_peer(device, index) for index in others)
