"""The elementwise operations and linear layers of a decoder on the CPU; reference.py says what each computes.

An eager torch call costs 1 to 3 us beside its arithmetic, so each operation is written in the fewest calls.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN computes 4 rows faster than 1, 2 or 3. All linears of SmolLM2-135M's 30 layers on two EPYC cores:
# bf16 10.3, 10.9, 9.4 and 9.2 ms for 1, 2, 3 and 4 rows; fp32 17.6, 20.0, 13.6 and 12.8 ms.
_MIN_ROWS = 4


def pack_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Prepare x @ weight.T + bias, x: [n, in_features]; weight: [out_features, in_features], float32 or bfloat16."""
    if not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, weight, bias)
    # oneDNN's own weight layout: half the time of F.linear, in float32 too.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    run = torch.ops.mkldnn._linear_pointwise.default
    padded = weight.new_zeros(_MIN_ROWS, weight.shape[1])
    rows = [padded[:num_rows] for num_rows in range(_MIN_ROWS)]  # made once: a slice costs as much as the copy

    def linear(x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if num_rows >= _MIN_ROWS:
            return run(x, packed, bias, "none", [], "")
        rows[num_rows].copy_(x)
        return run(padded, packed, bias, "none", [], "")[:num_rows]

    return linear


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [n, ..., size]; weight: [..., size]."""
    # PyTorch has a fused kernel for LayerNorm only. It is RMSNorm where the mean is 0, and that of (x, -x) is.
    size = x.shape[-1]
    return torch.layer_norm(torch.cat((x, x.neg()), dim=-1), (2 * size,), eps=eps)[..., :size] * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, residual: [n, size]; residual becomes their sum, and its norm is returned."""
    return rms_norm(residual.add_(x), weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [n, heads, head_dim]; cos, sin: [n, 1, head_dim], the first half of sin negated."""
    return torch.mul(x, cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [n, 2 * size] -> [n, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
