"""Attention, norms and rotations of the library in C against the oracle, at every level of processor.

Tolerances: float32 differs by the order of sums only; bfloat16 rounds queries and the softmax's weights to 8 bits.
"""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.cpu.library import DTYPE_FORMATS, Library, SequenceStruct, address

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# A build is the same for all examples.
few_examples = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclasses.dataclass(frozen=True)
class Case:
    block_size: int
    num_kv_heads: int
    group: int  # query heads a kv head
    head_dim: int
    num_cached: int
    num_tokens: int
    num_spans: int
    seed: int

    @property
    def context_len(self) -> int:
        return self.num_cached + self.num_tokens


cases = st.builds(
    Case,
    block_size=st.sampled_from([1, 4, 16, 64]),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7, 17]),
    head_dim=st.sampled_from([8, 16, 40, 64, 128]),
    num_cached=st.integers(0, 150),
    num_tokens=st.sampled_from([1, 1, 2, 5, 40]),
    num_spans=st.integers(1, 4),
    seed=st.integers(0, 99),
)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(library: Library, case: Case, q: Tensor, kv_cache: Tensor, block_table: Tensor) -> Tensor:
    sequence = SequenceStruct(
        num_heads=q.shape[1],
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        block_size=case.block_size,
        cache_format=DTYPE_FORMATS[kv_cache.dtype],
        kv_cache=address(kv_cache),
        block_table=address(block_table),
        first_position=case.num_cached,
        num_tokens=case.num_tokens,
    )
    result = torch.empty(q.shape)
    library.functions.duet_attention(sequence, address(q), case.num_spans, address(result))
    return result


def check(library: Library, case: Case, dtype: torch.dtype) -> None:
    num_blocks = -(-case.context_len // case.block_size)
    generator = torch.Generator().manual_seed(case.seed)
    block_table = torch.randperm(num_blocks + 3, generator=generator)[:num_blocks].int()
    shape = (num_blocks + 3, case.num_kv_heads, 2, case.block_size, case.head_dim)
    kv_cache = random(*shape, seed=case.seed).to(dtype)
    q = random(case.num_tokens, case.num_kv_heads * case.group, case.head_dim, seed=case.seed + 1)
    expected = reference.paged_prefill_attention(
        q.to(dtype).float(), kv_cache, (0, case.num_tokens), (case.context_len,), block_table[None]
    )
    # What lies behind the context, and in blocks of others, is nobody's business.
    in_context = torch.zeros(shape[0] * case.block_size, dtype=torch.bool)
    positions = torch.arange(case.context_len)
    in_context[block_table[positions // case.block_size] * case.block_size + positions % case.block_size] = True
    outside = ~in_context.view(shape[0], 1, 1, case.block_size, 1)
    kv_cache = kv_cache.masked_fill(outside, torch.nan)
    torch.testing.assert_close(run(library, case, q, kv_cache, block_table), expected, **TOLERANCE[dtype])


@both_dtypes
@few_examples
@given(case=cases)
def test_attention_matches_the_oracle_and_reads_nothing_outside_the_context(
    library: Library, dtype: torch.dtype, case: Case
):
    check(library, case, dtype)


@both_dtypes
@pytest.mark.parametrize("num_cached", [0, 1, 62, 63, 64, 65, 127, 128])
@pytest.mark.parametrize("num_tokens", [1, 64, 70])
def test_attention_matches_the_oracle_where_chunks_end(
    library: Library, dtype: torch.dtype, num_cached: int, num_tokens: int
):
    check(library, Case(64, 3, 3, 64, num_cached, num_tokens, 1, 0), dtype)
    check(library, Case(64, 1, 4, 128, num_cached, num_tokens, 3, 0), dtype)


@both_dtypes
def test_large_scores_neither_overflow_nor_vanish(library: Library, dtype: torch.dtype):
    case = Case(16, 1, 2, 64, 99, 1, 2, 0)
    kv_cache = random(7, 1, 2, 16, 64, seed=0).to(dtype)
    block_table = torch.arange(7, dtype=torch.int32)
    q = (random(1, 2, 64, seed=1) * 60).to(dtype).float()
    expected = reference.paged_prefill_attention(q, kv_cache, (0, 1), (100,), block_table[None])
    # A score of 150 is known to 1e-5, and so is the logarithm of its weight.
    tolerance: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(run(library, case, q, kv_cache, block_table), expected, **tolerance)


@pytest.mark.parametrize("size", [1, 8, 64, 576, 1000])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
def test_the_rms_norm_matches_the_oracle(library: Library, size: int, scale: float):
    x, weight = random(5, size, seed=0) * scale, random(size, seed=1)
    actual = torch.empty(x.shape)
    library.functions.duet_rms_norm(address(x), address(weight), *x.shape, 1e-6, address(actual))
    torch.testing.assert_close(actual, reference.rms_norm(x, weight, 1e-6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dim", [2, 8, 64, 128])
def test_rotations_match_the_oracle_up_to_far_positions(library: Library, head_dim: int):
    positions = torch.tensor([0, 1, 77, 8191, 131071])
    x, inv_freq = random(5, 3, head_dim, seed=0), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    expected = reference.rope(x, positions, inv_freq)
    library.functions.duet_rotate(address(x), address(positions), address(inv_freq), *x.shape)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
