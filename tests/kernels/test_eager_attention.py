"""Paged attention on the CPU against the oracle, over ragged shapes.

Tolerances: float32 differs by the order of sums only; bfloat16 rounds the softmax's weights and the result to 8 bits.
"""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.cpu import eager_attention

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Shape:
    block_size: int
    num_kv_heads: int
    group: int  # query heads a kv head
    head_dim: int


shapes = st.builds(
    Shape, st.sampled_from([4, 16, 64]), st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 7]), st.sampled_from([64, 128])
)


@dataclasses.dataclass
class Paged:
    """Sequences with random keys and values, scattered over a cache whose other blocks hold noise."""

    shape: Shape
    kv_cache: torch.Tensor  # [num_blocks, kv_heads, 2, block_size, head_dim]
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32

    @classmethod
    def random(cls, shape: Shape, context_lens: list[int], dtype: torch.dtype, seed: int) -> "Paged":
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // shape.block_size) for length in context_lens]
        num_blocks = sum(counts) + 3
        cache_shape = (num_blocks, shape.num_kv_heads, 2, shape.block_size, shape.head_dim)
        kv_cache = torch.randn(cache_shape, generator=generator).to(dtype)
        free = torch.randperm(num_blocks, generator=generator).int().split([*counts, 3])
        block_tables = torch.full((len(counts), max(counts) + 1), int(free[-1][0]), dtype=torch.int32)
        for table, blocks in zip(block_tables, free, strict=False):
            table[: len(blocks)] = blocks
        return cls(shape, kv_cache, block_tables)

    def slots(self, sequence: int, start: int, end: int) -> torch.Tensor:
        positions = torch.arange(start, end)
        blocks = self.block_tables[sequence, positions // self.shape.block_size].long()
        return blocks * self.shape.block_size + positions % self.shape.block_size

    def heads(self, num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v as slices of one packed tensor, as the model has them."""
        kv_heads, q_heads = self.shape.num_kv_heads, self.shape.num_kv_heads * self.shape.group
        generator = torch.Generator().manual_seed(seed)
        packed = torch.randn(num_tokens, q_heads + 2 * kv_heads, self.shape.head_dim, generator=generator)
        q, k, v = packed.to(self.kv_cache.dtype).split([q_heads, kv_heads, kv_heads], dim=1)
        return q, k, v

    def store(self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        rows = eager_attention.cache_rows(slot_mapping, self.shape.num_kv_heads, self.shape.block_size)
        eager_attention.store_kv(k, v, self.kv_cache, rows)


@both_dtypes
@settings(max_examples=15)
@given(shape=shapes, num_tokens=st.integers(1, 20), seed=st.integers(0, 99))
def test_store_kv_writes_the_mapped_slots_and_nothing_else(
    dtype: torch.dtype, shape: Shape, num_tokens: int, seed: int
):
    paged = Paged.random(shape, [num_tokens, 30], dtype, seed)
    expected = paged.kv_cache.clone()
    _, k, v = paged.heads(num_tokens, seed)
    slots = paged.slots(0, 0, num_tokens)
    reference.store_kv(k, v, expected, slots)
    paged.store(k, v, slots)
    assert torch.equal(paged.kv_cache, expected)


@both_dtypes
@settings(max_examples=40)
@given(shape=shapes, context_lens=st.lists(st.integers(1, 200), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_decode_attention_matches_the_oracle(dtype: torch.dtype, shape: Shape, context_lens: list[int], seed: int):
    check_decode(shape, context_lens, dtype, seed)


@both_dtypes
@pytest.mark.parametrize(
    "context_lens",
    [[1], [64], [65], [128, 128], [900, 3, 870, 1, 64, 500], [700, 1] * 3, [1, 700, 2]],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_decode_attention_matches_the_oracle_where_groups_and_blocks_end(context_lens: list[int], dtype: torch.dtype):
    check_decode(Shape(64, 3, 3, 64), context_lens, dtype, seed=0)


def check_decode(shape: Shape, context_lens: list[int], dtype: torch.dtype, seed: int) -> None:
    paged = Paged.random(shape, context_lens, dtype, seed)
    q, _, _ = paged.heads(len(context_lens), seed)
    lengths = torch.tensor(context_lens, dtype=torch.int32)
    plan = eager_attention.plan_decode(paged.block_tables, lengths, shape.num_kv_heads, shape.block_size, dtype)
    actual = eager_attention.decode_attention(q, paged.kv_cache, plan)
    expected = reference.paged_decode_attention(q, paged.kv_cache, paged.block_tables, lengths)
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


def test_very_different_lengths_are_not_padded_to_the_longest():
    lengths = torch.tensor([4000, 10, 4000, 12, 11], dtype=torch.int32)
    plan = eager_attention.plan_decode(torch.zeros(5, 63, dtype=torch.int32), lengths, 1, 64, torch.float32)
    gathered_blocks = sum(len(group.planes) for group in plan.groups) // 2
    assert gathered_blocks == 63 * 2 + 3


@both_dtypes
@settings(max_examples=40)
@given(
    shape=shapes,
    chunks=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_prefill_attention_matches_the_oracle_with_and_without_cached_prefixes(
    dtype: torch.dtype, shape: Shape, chunks: list[tuple[int, int]], seed: int
):
    context_lens = [cached + count for cached, count in chunks]
    paged = Paged.random(shape, context_lens, dtype, seed)
    query_starts = [0]
    for _, count in chunks:
        query_starts.append(query_starts[-1] + count)
    q, k, v = paged.heads(query_starts[-1], seed)
    slots = torch.cat([paged.slots(i, cached, cached + count) for i, (cached, count) in enumerate(chunks)])
    paged.store(k, v, slots)
    step = (tuple(query_starts), tuple(context_lens), paged.block_tables)
    plan = eager_attention.plan_prefill(*step, shape.num_kv_heads, shape.block_size, dtype)
    actual = eager_attention.prefill_attention(q, k, v, paged.kv_cache, plan)
    torch.testing.assert_close(actual, reference.paged_prefill_attention(q, paged.kv_cache, *step), **TOLERANCE[dtype])


@settings(max_examples=15)
@given(shape=shapes, cuts=st.lists(st.integers(1, 99), max_size=4, unique=True).map(sorted), seed=st.integers(0, 99))
def test_a_prompt_attends_alike_whole_and_in_chunks(shape: Shape, cuts: list[int], seed: int):
    paged = Paged.random(shape, [100], torch.float32, seed)
    q, k, v = paged.heads(100, seed)

    def run(start: int, end: int) -> torch.Tensor:
        rows = slice(start, end)
        paged.store(k[rows], v[rows], paged.slots(0, start, end))
        step = ((0, end - start), (end,), paged.block_tables)
        plan = eager_attention.plan_prefill(*step, shape.num_kv_heads, shape.block_size, torch.float32)
        return eager_attention.prefill_attention(q[rows], k[rows], v[rows], paged.kv_cache, plan)

    whole = run(0, 100)
    bounds = [0, *cuts, 100]
    chunked = torch.cat([run(start, end) for start, end in itertools.pairwise(bounds)])
    torch.testing.assert_close(chunked, whole, **TOLERANCE[torch.float32])
