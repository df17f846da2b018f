"""Linear layers of at most 16 rows, limited by reading the weight; the norm before and the activation behind fused in.

A program computes `block_n` outputs of all rows. Its warps share each tile along K, with an accumulator each: the
tensor cores take some 33 cycles a step of 16 along one chain, which for one warp would exceed the time of the loads.
Nothing waits for the mean square: rows are multiplied by the norm's weight, and the sums by the norm's scale, one
number a row. In bf16 the product with the norm's weight is rounded, not the normalized row: errors of one size.
Sums are taken in a fixed order: the same inputs give the same bits.
"""

# pyright: reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.activation import silu
from kernels.gpu.interpreted import INTERPRETED

MAX_ROWS = 16


class Config(NamedTuple):
    """How a weight is cut."""

    block_n: int  # outputs a program, 8 or more; gate_up takes twice as many rows of the weight
    block_k: int  # columns a step, 16 or more for each warp
    num_warps: int
    num_stages: int  # steps in flight, plus one


def pick_config(out_features: int, in_features: int, gate_up: bool) -> Config:
    """Enough programs for 132 SMs, and as much of the weight in flight as fits: a small one altogether.

    For bfloat16: in float32 a tile of 16 rows may not fit an SM. out_features counts gate and up as one. Fewer than
    two steps are not pipelined, and masks cost least where the steps divide in_features.
    """
    block_k = next((size for size in (1024, 512, 256) if in_features % size == 0 and size < in_features), 256)
    if out_features <= 2048:
        return Config(8, block_k, 8, 4)
    if gate_up:
        return Config(8, block_k, 8, 3)
    if out_features <= 8192:
        return Config(16, block_k, 8, 3)
    return Config(64, 256, 4, 4)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config | None = None) -> Tensor:
    """x: [n, in_features], rows of any stride; weight: [out_features, in_features]; bias: [out_features].

    Returns [n, out_features].
    """
    out = _empty_rows(x, weight.shape[0])
    _launch(x, None, None, 0.0, weight, bias, out, None, config, gate_up=False)
    return out


def gate_up(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config | None = None) -> Tensor:
    """`linear` with silu_and_mul behind it; weight: [2 * size, in_features], the gate's rows first; bias: [2 * size].

    Returns [n, size].
    """
    out = _empty_rows(x, weight.shape[0] // 2)
    _launch(x, None, None, 0.0, weight, bias, out, None, config, gate_up=True)
    return out


def add_norm_linear(
    x: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear` of the RMSNorm of x + residual.

    x, residual: [n, in_features]; norm_weight: [in_features]; weight: [out_features, in_features].
    Returns [n, out_features] and x + residual in a new tensor (residual itself without x): other programs still read
    the old one.
    """
    out = _empty_rows(residual, weight.shape[0])
    total = residual if x is None else _empty_rows(residual, residual.shape[1])
    _launch(x, residual, norm_weight, eps, weight, bias, out, total, config, gate_up=False)
    return out, total


def add_norm_gate_up(
    x: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_norm_linear` with silu_and_mul behind it.

    weight: [2 * size, in_features], the gate's rows first; bias: [2 * size]. Returns [n, size] and x + residual.
    """
    out = _empty_rows(residual, weight.shape[0] // 2)
    total = residual if x is None else _empty_rows(residual, residual.shape[1])
    _launch(x, residual, norm_weight, eps, weight, bias, out, total, config, gate_up=True)
    return out, total


def _empty_rows(like: Tensor, size: int) -> Tensor:
    return torch.empty((like.shape[0], size), dtype=like.dtype, device=like.device)


def _launch(
    x: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    config: Config | None,
    *,
    gate_up: bool,
) -> None:
    num_rows, out_features = out.shape
    in_features = weight.shape[1]
    assert num_rows <= MAX_ROWS
    assert weight.is_contiguous()
    assert all(rows is None or rows.stride(1) == 1 for rows in (x, residual))
    block_n, block_k, num_warps, num_stages = config or pick_config(out_features, in_features, gate_up)
    _linear_kernel[(triton.cdiv(out_features, block_n),)](
        x, residual, norm_weight, weight, bias, out, total, 0 if x is None else x.stride(0),
        0 if residual is None else residual.stride(0), eps, num_rows,
        OUT_FEATURES=out_features, IN_FEATURES=in_features, HAS_X=x is not None, HAS_NORM=norm_weight is not None,
        HAS_BIAS=bias is not None, GATE_UP=gate_up, ROWS=triton.next_power_of_2(num_rows),
        BLOCK_N=block_n, BLOCK_K=block_k, SLICES=num_warps, NUM_STAGES=num_stages, num_warps=num_warps,
    )  # fmt: skip


@triton.jit
def _load_weight(ptrs, k, mask_n, IN_FEATURES: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """ptrs: [SLICES, SLICE, TILE_N]; k: [SLICES, SLICE, 1]; mask_n: [1, 1, TILE_N]."""
    if EVEN_N and EVEN_K:
        weight = tl.load(ptrs)
    elif EVEN_K:
        weight = tl.load(ptrs, mask=mask_n, other=0.0)
    else:
        weight = tl.load(ptrs, mask=mask_n & (k < IN_FEATURES), other=0.0)
    return weight


@triton.jit
def _load_input(
    x_ptr, residual_ptr, total_ptr, x_stride, residual_stride, num_rows, k, HAS_X: tl.constexpr,
    HAS_NORM: tl.constexpr, ROWS: tl.constexpr, IN_FEATURES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """What is to be normalized, or else multiplied: [SLICES, ROWS, SLICE], zeros where there is no row or no column.

    k: [SLICES, 1, SLICE]. The first program stores the sum of x and residual.
    """
    row = tl.arange(0, ROWS)[None, :, None]
    mask = row < num_rows if EVEN_K else (row < num_rows) & (k < IN_FEATURES)
    if HAS_X:
        rows = tl.load(x_ptr + row * x_stride + k, mask=mask, other=0.0)
        if HAS_NORM:
            residual = tl.load(residual_ptr + row * residual_stride + k, mask=mask, other=0.0)
            rows = (rows.to(tl.float32) + residual.to(tl.float32)).to(rows.dtype)
            tl.store(total_ptr + row * IN_FEATURES + k, rows, mask=mask & (tl.program_id(0) == 0))
    else:
        rows = tl.load(residual_ptr + row * residual_stride + k, mask=mask, other=0.0)
    return rows


@triton.jit
def _times_norm_weight(rows, norm_weight_ptr, k, IN_FEATURES: tl.constexpr, EVEN_K: tl.constexpr):
    """rows: [SLICES, ROWS, SLICE]; k: [SLICES, 1, SLICE]; also returns the sums of squares [SLICES, ROWS], float32."""
    if EVEN_K:
        norm_weight = tl.load(norm_weight_ptr + k)
    else:
        norm_weight = tl.load(norm_weight_ptr + k, mask=k < IN_FEATURES, other=0.0)
    values = rows.to(tl.float32)
    return (values * norm_weight.to(tl.float32)).to(rows.dtype), tl.sum(values * values, axis=2)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, x_stride, residual_stride, eps,
    num_rows, OUT_FEATURES: tl.constexpr, IN_FEATURES: tl.constexpr, HAS_X: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr, GATE_UP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    TILE_N: tl.constexpr = 2 * BLOCK_N if GATE_UP else BLOCK_N
    SLICE: tl.constexpr = BLOCK_K // SLICES
    EVEN_N: tl.constexpr = OUT_FEATURES % BLOCK_N == 0
    EVEN_K: tl.constexpr = IN_FEATURES % BLOCK_K == 0
    start_n = tl.program_id(0) * BLOCK_N
    tile = tl.arange(0, TILE_N)
    if GATE_UP:  # gate and up rows take turns, so that one accumulator holds both
        weight_row = (start_n + tile // 2).to(tl.int64) + tile % 2 * OUT_FEATURES
        mask_n = start_n + tile // 2 < OUT_FEATURES
    else:
        weight_row = (start_n + tile).to(tl.int64)
        mask_n = start_n + tile < OUT_FEATURES
    slice_start = (tl.arange(0, SLICES) * SLICE)[:, None, None]
    k_of_rows = slice_start + tl.arange(0, SLICE)[None, None, :]
    k_of_weight = slice_start + tl.arange(0, SLICE)[None, :, None]
    weight_ptrs = weight_ptr + weight_row[None, None, :] * IN_FEATURES + k_of_weight

    acc = tl.zeros([SLICES, ROWS, TILE_N], tl.float32)
    square_sum = tl.zeros([SLICES, ROWS], tl.float32)
    for start_k in tl.range(0, IN_FEATURES, BLOCK_K, num_stages=NUM_STAGES):
        weight = _load_weight(
            weight_ptrs + start_k, start_k + k_of_weight, mask_n[None, None, :], IN_FEATURES, EVEN_N, EVEN_K
        )
        k = start_k + k_of_rows
        rows = _load_input(
            x_ptr, residual_ptr, total_ptr, x_stride, residual_stride, num_rows, k,
            HAS_X, HAS_NORM, ROWS, IN_FEATURES, EVEN_K,
        )  # fmt: skip
        if HAS_NORM:
            rows, squares = _times_norm_weight(rows, norm_weight_ptr, k, IN_FEATURES, EVEN_K)
            square_sum += squares
        if INTERPRETED:
            rows, weight = rows.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(rows, weight, acc, input_precision="ieee")

    out = tl.sum(acc, axis=0)
    if HAS_NORM:
        out *= tl.rsqrt(tl.sum(square_sum, axis=0) / IN_FEATURES + eps)[:, None]
    if HAS_BIAS:
        out += tl.load(bias_ptr + weight_row, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out = out.to(dtype)
    if GATE_UP:
        gate, up = tl.split(tl.reshape(out.to(tl.float32), [ROWS, BLOCK_N, 2]))
        out = (silu(gate) * up).to(dtype)
    column = start_n + tl.arange(0, BLOCK_N)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    tl.store(out_ptr + row * OUT_FEATURES + column, out, mask=(row < num_rows) & (column < OUT_FEATURES))
