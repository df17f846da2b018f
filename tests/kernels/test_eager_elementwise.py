"""Norms, rotation, activation and linear layers on the CPU against their oracles.

Tolerances: float32 differs by the order of sums only; bfloat16 has 8 bits, and a chain rounds up to three times.
"""

from typing import Any

import pytest
import torch

from kernels import reference
from kernels.cpu import eager

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
row_counts = pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 33])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@both_dtypes
@row_counts
def test_rms_norm_matches_the_oracle_and_leaves_its_input(num_rows: int, dtype: torch.dtype):
    x, weight = random(num_rows, 96, dtype=dtype) * 3, random(96, dtype=dtype, seed=1)
    before = x.clone()
    torch.testing.assert_close(eager.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), **TOLERANCE[dtype])
    assert torch.equal(x, before)


@both_dtypes
def test_rms_norm_of_heads_takes_a_weight_for_each_head(dtype: torch.dtype):
    packed = random(7, 10, 64, dtype=dtype)
    heads, weight = packed[:, 2:8], random(6, 64, dtype=dtype, seed=1)
    expected = torch.stack([reference.rms_norm(heads[:, h], weight[h], 1e-6) for h in range(6)], dim=1)
    torch.testing.assert_close(eager.rms_norm(heads, weight, 1e-6), expected, **TOLERANCE[dtype])


@both_dtypes
def test_rms_norm_of_nearly_nothing_is_held_by_eps(dtype: torch.dtype):
    x, weight = random(3, 64, dtype=dtype) * 1e-4, torch.ones(64, dtype=dtype)
    torch.testing.assert_close(eager.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), **TOLERANCE[dtype])


@both_dtypes
@row_counts
def test_add_rms_norm_normalizes_the_sum_and_keeps_it_as_residual(num_rows: int, dtype: torch.dtype):
    x, residual, weight = (
        random(*shape, dtype=dtype, seed=s) for s, shape in enumerate([(num_rows, 96)] * 2 + [(96,)])
    )
    expected, total = reference.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(eager.add_rms_norm(x, residual, weight, 1e-5), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(residual, total, rtol=0, atol=0)


@both_dtypes
@row_counts
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_matches_the_oracle_on_a_slice_of_packed_heads(num_rows: int, head_dim: int, dtype: torch.dtype):
    x = random(num_rows, 8, head_dim, dtype=dtype)[:, :5]
    positions = torch.arange(num_rows) * 37
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = (positions[:, None].float() * inv_freq)[:, None]
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    torch.testing.assert_close(eager.rope(x, cos, sin), reference.rope(x, positions, inv_freq), **TOLERANCE[dtype])


@both_dtypes
@row_counts
def test_silu_and_mul_matches_the_oracle(num_rows: int, dtype: torch.dtype):
    gate_up = random(num_rows, 192, dtype=dtype) * 4
    before = gate_up.clone()
    torch.testing.assert_close(eager.silu_and_mul(gate_up), reference.silu_and_mul(gate_up), **TOLERANCE[dtype])
    assert torch.equal(gate_up, before)


@both_dtypes
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_linear_is_the_matrix_product_for_every_row_count(num_rows: int, has_bias: bool, dtype: torch.dtype):
    x, weight = random(num_rows, 72, dtype=dtype), random(40, 72, dtype=dtype, seed=1)
    bias = random(40, dtype=dtype, seed=2) if has_bias else None
    linear = eager.pack_linear(weight, bias)
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
    tolerance: dict[str, Any] = (
        {"rtol": 1e-2, "atol": 1e-1} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    )
    torch.testing.assert_close(linear(x).double(), expected, **tolerance)


@both_dtypes
def test_packed_linear_of_fewer_rows_forgets_the_rows_of_the_call_before(dtype: torch.dtype):
    weight = random(40, 72, dtype=dtype, seed=1)
    linear, fresh = eager.pack_linear(weight, None), eager.pack_linear(weight, None)
    first, second = random(3, 72, dtype=dtype) * 100, random(1, 72, dtype=dtype, seed=2)
    kept = linear(first)
    snapshot = kept.clone()
    assert torch.equal(linear(second), fresh(second))
    assert torch.equal(kept, snapshot)
