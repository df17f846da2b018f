"""Linear layers of few rows, with a norm before and an activation behind, against the oracles one after the other.

Tolerances: float32 differs by the order of sums. bfloat16 by the rounding of results of the size of 1 to 8 bits, and
behind a norm by that of its inputs: the kernel rounds x times the norm's weight where the chain rounds the normalized
row, and the interpreter cuts to bfloat16 where a GPU rounds.
"""

import dataclasses

import pytest
import torch

from kernels import reference
from kernels.gpu.skinny_linear import Config, add_norm_gate_up, add_norm_linear, linear
from tests.kernels.gpu.paged import TOLERANCE, moved, poisoned_outputs

EPS = 1e-6
BEHIND_NORM = {torch.float32: TOLERANCE[torch.float32], torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2}}
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
biases = pytest.mark.parametrize("has_bias", [False, True])
shapes = pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features", "config"),
    [
        (1, 32, 256, Config(8, 128, 8, 3)),
        (5, 24, 288, Config(8, 128, 4, 4)),  # in_features over the border of a step and of a warp's slice
        (16, 40, 192, Config(16, 64, 4, 3)),  # out_features over the border of a block
        (3, 17, 100, Config(16, 256, 8, 3)),  # less than one step
        (2, 8, 576, None),
    ],
)


@dataclasses.dataclass
class Inputs:
    x: torch.Tensor  # [num_rows, in_features]
    residual: torch.Tensor  # as x, with rows of a stride of their own
    norm_weight: torch.Tensor  # [in_features]
    weight: torch.Tensor  # [out_features, in_features]
    bias: torch.Tensor | None  # [out_features]

    def on(self, device: torch.device) -> "Inputs":
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Inputs(*(x if x is None else moved(x, device) for x in fields))  # pyright: ignore[reportArgumentType]


def random_inputs(num_rows: int, out_features: int, in_features: int, has_bias: bool, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(num_rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight = random(out_features, in_features) / in_features**0.5
    return Inputs(
        random(num_rows, in_features).to(dtype),
        (random(num_rows, in_features + 8) * 4).to(dtype)[:, :in_features],
        (1 + random(in_features) / 8).to(dtype),
        weight.to(dtype),
        random(out_features).to(dtype) if has_bias else None,
    )


def reference_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.float() @ weight.float().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def assert_sum(out: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits; the interpreter cuts to bfloat16 where a GPU rounds."""
    rtol = 2**-7 if out.device.type == "cpu" and out.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(out.cpu(), expected, rtol=rtol, atol=0)


@both_dtypes
@biases
@shapes
def test_linear_matches_the_oracle(device, dtype, has_bias, num_rows, out_features, in_features, config):
    inputs = random_inputs(num_rows, out_features, in_features, has_bias, dtype)
    given = inputs.on(device)
    with poisoned_outputs():
        out = linear(given.residual, given.weight, given.bias, config)
    expected = reference_linear(inputs.residual, inputs.weight, inputs.bias)
    torch.testing.assert_close(out.cpu(), expected, **TOLERANCE[dtype])


@both_dtypes
@biases
@shapes
def test_add_norm_linear_matches_the_oracles(device, dtype, has_bias, num_rows, out_features, in_features, config):
    inputs = random_inputs(num_rows, out_features, in_features, has_bias, dtype)
    given = inputs.on(device)
    with poisoned_outputs():
        out, total = add_norm_linear(given.x, given.residual, given.norm_weight, EPS, given.weight, given.bias, config)
    normed, expected_total = reference.add_rms_norm(inputs.x, inputs.residual, inputs.norm_weight, EPS)
    expected = reference_linear(normed, inputs.weight, inputs.bias)
    torch.testing.assert_close(out.cpu(), expected, **BEHIND_NORM[dtype])
    assert_sum(total, expected_total)
    assert torch.equal(given.residual.cpu(), inputs.residual)


@both_dtypes
@biases
@shapes
def test_add_norm_gate_up_matches_the_oracles(device, dtype, has_bias, num_rows, out_features, in_features, config):
    inputs = random_inputs(num_rows, 2 * out_features, in_features, has_bias, dtype)
    given = inputs.on(device)
    with poisoned_outputs():
        out, total = add_norm_gate_up(given.x, given.residual, given.norm_weight, EPS, given.weight, given.bias, config)
    normed, expected_total = reference.add_rms_norm(inputs.x, inputs.residual, inputs.norm_weight, EPS)
    expected = reference.silu_and_mul(reference_linear(normed, inputs.weight, inputs.bias))
    torch.testing.assert_close(out.cpu(), expected, **BEHIND_NORM[dtype])
    assert_sum(total, expected_total)


@both_dtypes
def test_without_x_the_residual_itself_is_normalized_and_returned(device, dtype):
    inputs = random_inputs(3, 24, 256, False, dtype)
    given = inputs.on(device)
    normed = reference.rms_norm(inputs.residual, inputs.norm_weight, EPS)
    out, total = add_norm_linear(None, given.residual, given.norm_weight, EPS, given.weight, None)
    torch.testing.assert_close(out.cpu(), reference_linear(normed, inputs.weight, None), **BEHIND_NORM[dtype])
    assert total is given.residual
    gated, total = add_norm_gate_up(None, given.residual, given.norm_weight, EPS, given.weight, None)
    expected = reference.silu_and_mul(reference_linear(normed, inputs.weight, None))
    torch.testing.assert_close(gated.cpu(), expected, **BEHIND_NORM[dtype])
    assert total is given.residual
    assert torch.equal(total.cpu(), inputs.residual)


@both_dtypes
def test_a_row_is_the_same_bits_whatever_rows_are_beside_it(device, dtype):
    """Of one power of two: another number of rows may be laid out differently."""
    inputs = random_inputs(8, 16, 256, False, dtype)
    given = inputs.on(device)
    whole = linear(given.x, given.weight, None).cpu()
    assert torch.equal(linear(given.x[3:8], given.weight, None).cpu(), whole[3:8])
