"""Linear layers over panels against plain products, at every level of processor.

Tolerances: sums are in float32, in another order than PyTorch's; int8 is compared with what its rounding should give.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.library import Format, Library, LinearStruct, address
from kernels.cpu.panels import Arena, PanelLinear

FORMATS = [Format.FLOAT, Format.BF16, Format.INT8]
# (in_features, out_features): whole panels and words, and neither
SHAPES = [(64, 32), (576, 960), (72, 40), (33, 17), (7, 1), (130, 250)]
EXACT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

every_format = pytest.mark.parametrize("weight_format", FORMATS, ids=lambda value: value.name.lower())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}".format)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pack(library: Library, weight: Tensor, weight_format: Format, bias: Tensor | None = None) -> PanelLinear:
    return PanelLinear(library, weight, bias, weight_format, Arena())


def quantize(values: Tensor) -> Tensor:
    """What is left of each row when its largest magnitude becomes 127."""
    largest = values.abs().amax(-1, keepdim=True)
    return (values * (127 / largest)).round() * (largest / 127)


def rounded(values: Tensor, weight_format: Format) -> Tensor:
    if weight_format is Format.INT8:
        return quantize(values)
    return values.bfloat16().float() if weight_format is Format.BF16 else values


@every_format
@every_shape
@pytest.mark.parametrize("num_rows", [1, 2, 3, 6, 7, 14, 15, 16, 40])
def test_a_linear_layer_is_the_product_of_rounded_inputs_and_weights(
    library: Library, weight_format: Format, shape: tuple[int, int], num_rows: int
):
    in_features, out_features = shape
    x, weight = random(num_rows, in_features), random(out_features, in_features, seed=1)
    bias = random(out_features, seed=2) if num_rows % 2 else None
    expected = rounded(x, weight_format).double() @ rounded(weight, weight_format).double().T
    expected = (expected + (0 if bias is None else bias)).float()
    actual = pack(library, weight, weight_format, bias)(x)
    if weight_format is Format.INT8:
        # A value halfway between two integers may become either, a step of at most 1/32, times a weight of at most 4.
        assert (actual - expected).norm() < 5e-3 * expected.norm()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1 / 8)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@every_format
def test_a_row_has_the_same_bits_alone_and_among_others(library: Library, weight_format: Format):
    linear, x = pack(library, random(80, 200, seed=1), weight_format), random(37, 200)
    together = linear(x)
    for num_rows in (1, 2, 5, 13, 16, 29):
        assert torch.equal(linear(x[:num_rows].contiguous()), together[:num_rows])


@every_format
@every_shape
def test_the_weights_of_single_outputs_come_back_as_they_were_rounded(
    library: Library, weight_format: Format, shape: tuple[int, int]
):
    in_features, out_features = shape
    weight = random(out_features, in_features)
    outputs = torch.arange(out_features).flip(0)
    unpacked = pack(library, weight, weight_format).unpack(outputs)
    torch.testing.assert_close(unpacked, rounded(weight, weight_format)[outputs], **EXACT)


@every_format
def test_weights_of_bfloat16_are_packed_without_a_detour(library: Library, weight_format: Format):
    weight = random(48, 64).bfloat16()
    outputs = torch.arange(48)
    assert torch.equal(
        pack(library, weight, weight_format).unpack(outputs),
        pack(library, weight.float(), weight_format).unpack(outputs),
    )


def test_outputs_and_rows_of_zeros_are_zero_in_int8(library: Library):
    weight, x = random(32, 64), random(3, 64, seed=1)
    weight[5], x[1] = 0, 0
    actual = pack(library, weight, Format.INT8)(x)
    assert not actual[:, 5].any()
    assert not actual[1].any()
    assert actual.isfinite().all()


@every_format
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_an_input_that_is_not_finite_spoils_its_own_row_and_no_other(
    library: Library, weight_format: Format, bad: float
):
    linear, x = pack(library, random(32, 64), weight_format), random(4, 64, seed=1)
    expected = linear(x)
    x[2, 11] = bad
    actual = linear(x)
    assert not actual[2].isfinite().any()
    assert torch.equal(actual[[0, 1, 3]], expected[[0, 1, 3]])


@every_format
@pytest.mark.parametrize("num_rows", [1, 5, 16])
@pytest.mark.parametrize("size", [16, 48, 1536])
def test_gate_and_up_give_the_silu_of_one_times_the_other(
    library: Library, weight_format: Format, num_rows: int, size: int
):
    x, weight = random(num_rows, 64), random(2 * size, 64, seed=1) * 0.3
    bias = random(2 * size, seed=2)
    linear = pack(library, weight, weight_format, bias)
    struct = LinearStruct.from_buffer_copy(linear.struct)
    struct.is_gate_up = 1
    actual = torch.empty(num_rows, size)
    library.functions.duet_gate_up(struct, address(x), num_rows, address(actual))
    expected = reference.silu_and_mul(linear(x))
    if weight_format is Format.BF16:
        torch.testing.assert_close(actual, expected.bfloat16().float(), rtol=1e-2, atol=1e-5)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
