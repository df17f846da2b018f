"""The shapes of the GPUs' collectives, over gloo: each rank is a thread with a process group of its own."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from executor_service.distributed.gpu_collectives import GpuCollectives
from executor_service.distributed.placement import Placement
from tests.unit.rank_threads import ThreadGroup

NUM_RANKS = 3


def gathered(parts: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What `all_gather` gives each rank; parts: what each calls it with."""
    store, mine = HashStore(), threading.local()

    def all_gather_into_tensor(output: Tensor, x: Tensor) -> None:
        mine.group._allgather_base(output.flatten(0, 1), x).wait()  # NCCL takes both shapes, gloo this one

    def rank_main(rank: int) -> Tensor:
        mine.group = dist.ProcessGroupGloo(store, rank, NUM_RANKS, timedelta(seconds=20))
        collectives = object.__new__(GpuCollectives)  # without meeting over NCCL
        collectives._placement = Placement(rank=rank, size=NUM_RANKS)
        return collectives.all_gather(parts[rank])

    monkeypatch.setattr(dist, "all_gather_into_tensor", all_gather_into_tensor)
    return ThreadGroup(NUM_RANKS).run(rank_main)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_rows_of_all_ranks_lie_beside_each_other_in_rank_order(
    num_rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.arange(num_rows * 2 * NUM_RANKS).view(num_rows, -1).remainder(7).to(dtype)
    parts = list(whole.chunk(NUM_RANKS, dim=1))  # not contiguous
    for rows in gathered(parts, monkeypatch):
        assert torch.equal(rows, whole)
