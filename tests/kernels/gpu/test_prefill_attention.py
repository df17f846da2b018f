"""Paged prefill attention against the oracle: chunks of any length at the end of contexts of any length.

Tolerances: float32 differs by the order of sums only; bfloat16 rounds the softmax's weights and the result to 8 bits.
"""

import itertools

import pytest
import torch

from kernels import reference
from kernels.gpu.prefill_attention import CONFIGS, PrefillConfig, num_tiles, paged_prefill_attention
from tests.kernels.gpu.paged import TOLERANCE, Paged, Shape, moved, poisoned_outputs

CHUNKS = [(65, 65), (0, 0), (1, 1), (1, 64), (33, 130), (63, 63), (0, 0), (3, 128), (2, 17)]  # queries, context
PADDING = 3
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def prefill(
    paged: Paged, q: torch.Tensor, starts: list[int], config: PrefillConfig, device: torch.device
) -> torch.Tensor:
    """The kernel's result, on the CPU."""
    query_starts, context_lens = (torch.tensor(x, dtype=torch.int32) for x in (starts, paged.context_lens))
    max_tiles = num_tiles(len(q), len(context_lens), paged.shape.group, config)
    inputs = (paged.kv_cache, query_starts, context_lens, paged.slots, paged.block_tables)
    kv_cache, query_starts, context_lens, slots, block_tables = (x.to(device) for x in inputs)
    with poisoned_outputs():
        return paged_prefill_attention(
            moved(q, device), kv_cache, query_starts, context_lens, slots, block_tables, max_tiles, config
        ).cpu()


def check(shape: Shape, chunks: list[tuple[int, int]], dtype: torch.dtype, config: PrefillConfig, device: torch.device):
    """The kernel's result equals the oracle's, and rows of no sequence stay as they were."""
    starts = list(itertools.accumulate((length for length, _ in chunks), initial=0))
    paged = Paged.random(shape, [context for _, context in chunks], dtype)
    q = paged.queries(starts[-1] + PADDING)
    out = prefill(paged, q, starts, config, device)
    live = [i for i, (length, _) in enumerate(chunks) if length]
    oracle = reference.paged_prefill_attention(
        q[: starts[-1]],
        paged.kv_cache,
        (*(starts[i] for i in live), starts[-1]),
        tuple(paged.context_lens[i] for i in live),
        paged.block_tables[paged.slots[live]],
    )
    torch.testing.assert_close(out[: starts[-1]], oracle, **TOLERANCE[dtype])
    assert out[starts[-1] :].isnan().all()


@both_dtypes
@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (2, 128), (3, 64), (7, 64)])
def test_ragged_chunks_match_oracle(device, dtype, block_size, group, head_dim):
    check(Shape(block_size, 2, group, head_dim), CHUNKS, dtype, CONFIGS[dtype], device)


@both_dtypes
@pytest.mark.parametrize("block_n", [32, 64, 128])
@pytest.mark.parametrize(
    "chunks",
    [[(70, 70)], [(1, 200), (40, 129)], [(31, 32), (32, 96), (33, 161)], [(4, 34), (3, 65), (3, 129)]],
    ids=str,
)
def test_small_tiles_match_oracle(device, dtype, block_n, chunks):
    """Chunks of several tiles, on and off the tiles' borders."""
    check(
        Shape(num_kv_heads=1, group=2), chunks, dtype, PrefillConfig(block_m=32, block_n=block_n, num_warps=4), device
    )


def test_more_sequences_than_one_search(device):
    chunks = [(1, 1)] * 70
    check(Shape(num_kv_heads=1, group=1), chunks, torch.float32, CONFIGS[torch.float32], device)


def test_tokens_of_one_context_are_alike_in_one_chunk_and_in_several(device):
    shape, config = Shape(), CONFIGS[torch.bfloat16]
    paged = Paged.random(shape, [150], torch.bfloat16)
    q = paged.queries(150)
    whole = prefill(paged, q, [0, 150], config, device)
    paged.context_lens = [50]
    torch.testing.assert_close(prefill(paged, q[:50], [0, 50], config, device), whole[:50], **TOLERANCE[torch.bfloat16])
    paged.context_lens = [150]
    torch.testing.assert_close(
        prefill(paged, q[50:], [0, 100], config, device), whole[50:], **TOLERANCE[torch.bfloat16]
    )


def test_same_inputs_give_the_same_bits(device):
    paged = Paged.random(Shape(), [150], torch.bfloat16)
    q = paged.queries(90)
    first, second = (prefill(paged, q, [0, 90], CONFIGS[torch.bfloat16], device) for _ in range(2))
    assert torch.equal(first, second)
