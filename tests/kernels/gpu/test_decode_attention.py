"""Paged decode attention against the oracle: ragged batches, any split over programs.

Tolerances: float32 differs by the order of sums only; bfloat16 rounds the softmax's weights and the result to 8 bits.
"""

import dataclasses

import pytest
import torch

from kernels import reference
from kernels.gpu.decode_attention import DecodeConfig, Workspace, make_workspace, paged_decode_attention
from kernels.gpu.decode_split import make_schedule
from tests.kernels.gpu.paged import TOLERANCE, Paged, Shape, moved, poisoned_outputs

LENGTHS = [65, 0, 1, 64, 130, 63, 0, 17, 0]
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def workspace_of(
    shape: Shape, device: torch.device, num_programs: int, config: DecodeConfig | None = None
) -> Workspace:
    """A workspace whose partial results are NaN."""
    with poisoned_outputs():
        return make_workspace(
            shape.num_heads, shape.num_kv_heads, shape.head_dim, device, config, num_programs=num_programs
        )


def decode(paged: Paged, q: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    """The kernel's result, on the CPU."""
    device = workspace.counters.device
    context_lens = torch.tensor(paged.context_lens, dtype=torch.int32)
    inputs = (paged.kv_cache, paged.block_tables, paged.slots, context_lens)
    kv_cache, block_tables, slots, context_lens = (x.to(device) for x in inputs)
    with poisoned_outputs():
        schedule = make_schedule(context_lens, slots, block_tables, paged.shape.block_size, workspace.split)
        out = paged_decode_attention(moved(q, device), kv_cache, block_tables, slots, context_lens, schedule, workspace)
    assert not workspace.counters.any()
    return out.cpu()


def expected(paged: Paged, q: torch.Tensor) -> torch.Tensor:
    """The oracle's result, zeros where a row has no context."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    live = [row for row, length in enumerate(paged.context_lens) if length]
    lengths = torch.tensor(paged.context_lens)[live]
    out[live] = reference.paged_decode_attention(
        q[live], paged.kv_cache, paged.block_tables[paged.slots[live]], lengths
    )
    return out


@both_dtypes
@pytest.mark.parametrize("num_programs", [5, 24])  # equal shares; 20 parts or less
@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (2, 128), (3, 64), (7, 64), (16, 128)])
def test_ragged_batch_matches_oracle(device, dtype, num_programs, block_size, group, head_dim):
    shape = Shape(block_size, 2, group, head_dim)
    paged = Paged.random(shape, LENGTHS, dtype)
    q = paged.queries(len(LENGTHS))
    out = decode(paged, q, workspace_of(shape, device, num_programs))
    torch.testing.assert_close(out, expected(paged, q), **TOLERANCE[dtype])


@pytest.mark.parametrize("max_items", [0, 40], ids=["equal shares", "parts"])
@pytest.mark.parametrize("num_programs", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("lengths", [[300], [16, 1, 40], [5, 200, 0, 33]], ids=str)
def test_any_split_gives_the_same_result(device, num_programs, lengths, max_items):
    shape = Shape(num_kv_heads=3, group=3)
    paged = Paged.random(shape, lengths, torch.float32, seed=num_programs)
    q = paged.queries(len(lengths))
    config = DecodeConfig(max_items=max_items)
    out = decode(paged, q, workspace_of(shape, device, num_programs, config))
    torch.testing.assert_close(out, expected(paged, q), **TOLERANCE[torch.float32])


@pytest.mark.parametrize(("group", "num_parts"), [(1, 18), (2, 16), (2, 33), (16, 12)])
def test_one_head_shared_by_many_programs(device, group, num_parts):
    shape = Shape(num_kv_heads=1, group=group, head_dim=128)
    paged = Paged.random(shape, [16 * num_parts], torch.float32)
    q = paged.queries(1)
    out = decode(paged, q, workspace_of(shape, device, num_parts))
    torch.testing.assert_close(out, expected(paged, q), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("num_programs", [7, 16])
def test_workspace_serves_one_batch_after_another_with_identical_bits(device, num_programs):
    shape = Shape()
    workspace = workspace_of(shape, device, num_programs)
    batches = [Paged.random(shape, lengths, torch.bfloat16) for lengths in ([100, 31], [7, 0, 129], [100, 31])]
    queries = [paged.queries(len(paged.context_lens)) for paged in batches]
    first, _, third = (decode(paged, q, workspace) for paged, q in zip(batches, queries, strict=True))
    assert torch.equal(first, third)
    for _ in range(3):
        assert torch.equal(decode(batches[0], queries[0], workspace), first)


def test_batch_without_context_becomes_zeros(device):
    shape = Shape(num_kv_heads=1)
    paged = Paged.random(shape, [0] * 5, torch.bfloat16)
    assert not decode(paged, paged.queries(5), workspace_of(shape, device, 2)).any()


def test_live_rows_far_apart_are_found(device):
    shape = Shape(num_kv_heads=1, group=1)
    lengths = [0] * 1100
    lengths[3], lengths[1023], lengths[1024], lengths[1098] = 40, 3, 20, 18
    paged = Paged.random(shape, lengths, torch.float32)
    q = paged.queries(len(lengths))
    out = decode(paged, q, workspace_of(shape, device, 3))
    torch.testing.assert_close(out, expected(paged, q), **TOLERANCE[torch.float32])


def test_result_does_not_depend_on_what_lies_in_the_workspace(device):
    shape = Shape()
    paged = Paged.random(shape, [90, 50], torch.float32)
    q = paged.queries(2)
    workspace = workspace_of(shape, device, 5)
    out = decode(paged, q, workspace)
    zeros = {
        name: torch.zeros_like(getattr(workspace, name)) for name in ("partial_values", "partial_max", "partial_sum")
    }
    assert torch.equal(decode(paged, q, dataclasses.replace(workspace, **zeros)), out)


def test_config_keeps_registers_within_the_multiprocessor():
    assert DecodeConfig(num_warps=4, programs_per_sm=3).max_registers == 168
    assert DecodeConfig(num_warps=4, programs_per_sm=4).max_registers == 128
    assert DecodeConfig(num_warps=4, programs_per_sm=1).max_registers == 255
