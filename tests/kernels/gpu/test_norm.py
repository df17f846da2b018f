"""RMSNorm against the oracle. Tolerances: float32 differs by the order of sums; bfloat16 by one rounding to 8 bits."""

import pytest
import torch

from kernels import reference
from kernels.gpu.norm import add_rms_norm, rms_norm
from tests.kernels.gpu.paged import TOLERANCE, moved, poisoned_outputs

both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
shapes = pytest.mark.parametrize(("num_rows", "size"), [(1, 64), (3, 96), (8, 576), (2, 1024)])


def random_rows(num_rows: int, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[num_rows, size], every second row of a larger tensor whose other rows are NaN."""
    rows = torch.full((num_rows, 2, size), torch.nan, dtype=dtype)
    rows[:, 0] = torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * 3
    return rows[:, 0]


def assert_sum(out: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits; the interpreter cuts to bfloat16 where a GPU rounds."""
    rtol = 2**-7 if out.device.type == "cpu" and out.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(out.cpu(), expected, rtol=rtol, atol=0)


@both_dtypes
@shapes
def test_rms_norm_matches_the_oracle_and_leaves_its_input(device, dtype, num_rows, size):
    x, weight = random_rows(num_rows, size, dtype, 0), random_rows(1, size, dtype, 1)[0]
    given = moved(x, device)
    with poisoned_outputs():
        out = rms_norm(given, weight.to(device), 1e-6)
    torch.testing.assert_close(out.cpu(), reference.rms_norm(x, weight, 1e-6), **TOLERANCE[dtype])
    assert out.is_contiguous()
    assert torch.equal(given.cpu(), x)


@both_dtypes
@shapes
def test_add_rms_norm_keeps_the_rounded_sum_as_residual(device, dtype, num_rows, size):
    x, residual, weight = (random_rows(n, size, dtype, i) for i, n in enumerate((num_rows, num_rows, 1)))
    expected, total = reference.add_rms_norm(x, residual, weight[0], 1e-5)
    given, summed = moved(x, device), moved(residual, device)
    with poisoned_outputs():
        out = add_rms_norm(given, summed, weight[0].to(device), 1e-5)
    torch.testing.assert_close(out.cpu(), expected, **TOLERANCE[dtype])
    assert_sum(summed, total)
    assert torch.equal(given.cpu(), x)


@both_dtypes
def test_a_norm_of_nearly_nothing_is_held_by_eps(device, dtype):
    x, weight = random_rows(2, 64, dtype, 0) * 1e-4, torch.ones(64, dtype=dtype)
    out = rms_norm(x.to(device), weight.to(device), 1e-6).cpu()
    torch.testing.assert_close(out, reference.rms_norm(x, weight, 1e-6), **TOLERANCE[dtype])
