"""SiLU and product against the oracle. Tolerances: float32 by the exponential, bfloat16 by one rounding to 8 bits."""

import pytest
import torch

from kernels import reference
from kernels.gpu.activation import silu_and_mul
from tests.kernels.gpu.paged import TOLERANCE, moved, poisoned_outputs


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_rows", "size"), [(1, 64), (3, 96), (4, 1536), (2, 1024)])
def test_silu_and_mul_matches_the_oracle(device, dtype, num_rows, size):
    wide = torch.randn(num_rows, 2 * size + 8, generator=torch.Generator().manual_seed(0)) * 3
    wide[0, 0], wide[-1, size - 1] = -120.0, 120.0
    gate_up = wide.to(dtype)[:, : 2 * size]
    with poisoned_outputs():
        out = silu_and_mul(moved(gate_up, device)).cpu()
    torch.testing.assert_close(out, reference.silu_and_mul(gate_up), **TOLERANCE[dtype])
