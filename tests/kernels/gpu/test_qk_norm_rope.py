"""Bias, norm, rotation and KV store in one kernel against the oracles one after the other; the KV store alone.

Tolerances: float32 by the order of sums; bfloat16 is rounded where the oracles round, so that only rounding that
falls the other way in one of the steps differs.
"""

import dataclasses

import pytest
import torch

from kernels import reference
from kernels.gpu.qk_norm_rope import qk_norm_rope_store, store_kv
from tests.kernels.gpu.paged import TOLERANCE, moved

EPS = 1e-6
MAX_LEN = 5000
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dataclasses.dataclass(frozen=True)
class Case:
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    has_norm: bool
    has_bias: bool


@dataclasses.dataclass
class Inputs:
    qkv: torch.Tensor  # [num_tokens, (heads + 2 * kv_heads) * head_dim], rows of a wider tensor
    positions: torch.Tensor  # [num_tokens] int32
    slots: torch.Tensor  # [num_tokens] int32
    inv_freq: torch.Tensor  # [head_dim / 2] float32
    kv_cache: torch.Tensor  # NaN
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    bias: torch.Tensor | None


def random_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Token 1, where there are more, is padding: its slot is -1, its position a valid one."""
    generator = torch.Generator().manual_seed(case.num_tokens)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 2).to(dtype)

    width = (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
    num_blocks = case.num_tokens // case.block_size + 2
    slots = torch.randperm(num_blocks * case.block_size, generator=generator)[: case.num_tokens].int()
    slots[1:2] = -1
    return Inputs(
        random(case.num_tokens, width + 8)[:, :width],
        torch.randint(MAX_LEN, (case.num_tokens,), generator=generator).int(),
        slots,
        1 / 1e6 ** (torch.arange(case.head_dim // 2) * 2 / case.head_dim),
        torch.full((num_blocks, case.num_kv_heads, 2, case.block_size, case.head_dim), torch.nan, dtype=dtype),
        random(case.head_dim) if case.has_norm else None,
        random(case.head_dim) if case.has_norm else None,
        random(width) if case.has_bias else None,
    )


def expected(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and the cache after the oracles: [num_tokens, heads + 2 * kv_heads, head_dim] and kv_cache's shape."""
    rows = inputs.qkv
    if inputs.bias is not None:
        rows = (rows.float() + inputs.bias.float()).to(rows.dtype)
    heads = rows.unflatten(1, (-1, case.head_dim))
    q, k, v = heads.split([case.num_heads, case.num_kv_heads, case.num_kv_heads], dim=1)
    if inputs.q_norm is not None and inputs.k_norm is not None:
        q, k = reference.rms_norm(q, inputs.q_norm, EPS), reference.rms_norm(k, inputs.k_norm, EPS)
    q, k = (reference.rope(x, inputs.positions, inputs.inv_freq) for x in (q, k))
    kv_cache, live = inputs.kv_cache.clone(), inputs.slots >= 0
    reference.store_kv(k[live], v[live], kv_cache, inputs.slots[live].long())
    return torch.cat((q, k, v), dim=1), kv_cache


def rope_table(inv_freq: torch.Tensor) -> torch.Tensor:
    """[MAX_LEN, head_dim] float32, with the angles that reference.rope computes."""
    angles = torch.arange(MAX_LEN)[:, None].float() * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def check(case: Case, dtype: torch.dtype, device: torch.device, config: tuple[int, int] | None = None) -> None:
    inputs = random_inputs(case, dtype)
    qkv, kv_cache = moved(inputs.qkv, device), inputs.kv_cache.to(device)
    q_norm, k_norm, bias = (x if x is None else x.to(device) for x in (inputs.q_norm, inputs.k_norm, inputs.bias))
    qk_norm_rope_store(
        qkv,
        inputs.positions.to(device),
        inputs.slots.to(device),
        rope_table(inputs.inv_freq).to(device),
        kv_cache,
        q_norm,
        k_norm,
        bias,
        EPS,
        case.num_heads,
        case.num_kv_heads,
        config,
    )
    rows, expected_cache = expected(case, inputs)
    torch.testing.assert_close(qkv.cpu(), rows.flatten(1), **TOLERANCE[dtype])
    torch.testing.assert_close(kv_cache.cpu(), expected_cache, equal_nan=True, **TOLERANCE[dtype])
    places = ~expected_cache.isnan()
    assert torch.equal(kv_cache.cpu()[places].sort().values, _stored(case, qkv.cpu(), inputs.slots).sort().values)


def _stored(case: Case, qkv: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The keys and values of live rows: what the cache holds is what the rows hold, to the bit."""
    return qkv[slots >= 0][:, case.num_heads * case.head_dim :].flatten()


@both_dtypes
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 4, 2, 128, 64, True, False),
        Case(3, 3, 1, 64, 16, False, False),
        Case(5, 2, 2, 64, 16, True, True),
        Case(2, 7, 1, 64, 256, False, True),
        Case(4, 4, 1, 32, 32, True, False),
    ],
    ids=str,
)
def test_qkv_rows_and_cache_match_the_oracles(device, dtype, case):
    check(case, dtype, device)


@both_dtypes
def test_many_rows_a_program_match_the_oracles(device, dtype):
    check(Case(21, 3, 1, 64, 16, True, False), dtype, device, (64, 4))


@both_dtypes
def test_rotation_by_position_zero_is_none(device, dtype):
    case = Case(1, 2, 1, 64, 16, False, False)
    inputs = random_inputs(case, dtype)
    qkv, table = moved(inputs.qkv, device), rope_table(inputs.inv_freq).to(device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    qk_norm_rope_store(qkv, zero, zero, table, inputs.kv_cache.to(device), None, None, None, EPS, 2, 1)
    assert torch.equal(qkv.cpu(), inputs.qkv)


@both_dtypes
@pytest.mark.parametrize(("num_tokens", "num_kv_heads", "head_dim", "block_size"), [(5, 3, 64, 16), (1, 2, 128, 64)])
def test_store_kv_writes_live_tokens_only(device, dtype, num_tokens, num_kv_heads, head_dim, block_size):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(num_tokens, 3, num_kv_heads, head_dim, generator=generator).to(dtype)
    k, v = packed[:, 0], packed[:, 2]
    kv_cache = torch.full((2, num_kv_heads, 2, block_size, head_dim), torch.nan, dtype=dtype)
    slots = torch.randperm(2 * block_size, generator=generator)[:num_tokens].int()
    slots[1:2] = -1
    stored = kv_cache.to(device)
    store_kv(moved(k, device), moved(v, device), stored, slots.to(device))
    live = slots >= 0
    reference.store_kv(k[live], v[live], kv_cache, slots[live].long())
    torch.testing.assert_close(stored.cpu(), kv_cache, equal_nan=True, rtol=0, atol=0)
