"""RMSNorm of rows, alone or of a sum: one program a row."""

# pyright: reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [n, size], rows of any stride; weight: [size]. Returns [n, size], contiguous."""
    num_rows, size = x.shape
    assert x.stride(1) == 1
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_rows,)](
        x, x, weight, out, x.stride(0), 0, eps, SIZE=size, BLOCK=block, HAS_RESIDUAL=False, num_warps=_num_warps(block)
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, residual: [n, size], rows of any stride; residual becomes their sum, and its norm is returned: [n, size]."""
    num_rows, size = x.shape
    assert x.stride(1) == residual.stride(1) == 1
    out = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        residual.stride(0),
        eps,
        SIZE=size,
        BLOCK=block,
        HAS_RESIDUAL=True,
        num_warps=_num_warps(block),
    )
    return out


def _num_warps(block: int) -> int:
    """8 elements a thread: one 16-byte load in bf16."""
    return min(max(block // 256, 1), 16)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    # A literal where every column exists: the loads are then free of predicates.
    mask = (columns < SIZE) if BLOCK != SIZE else tl.full([BLOCK], True, tl.int1)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        place = residual_ptr + row * residual_stride + columns
        residual = tl.load(place, mask=mask, other=0.0)
        values = (values.to(tl.float32) + residual.to(tl.float32)).to(values.dtype)
        tl.store(place, values, mask=mask)
    values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    tl.store(out_ptr + row * SIZE + columns, (values * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)
