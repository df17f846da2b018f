"""What the sampler's kernels share: the noise of `kernels.reference.gumbel_noise`, the order of logits as integers."""

import triton
import triton.language as tl

from kernels.gpu.interpreted import INTERPRETED
from kernels.gpu.slot_state import CHOICE_INDEX, SEED_HIGH, SEED_LOW

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def noise_state(state, state_stride, slot, position):
    """MurmurHash3's state, uint32, after every word of a row's key but the token id."""
    hashed = tl.full((), 0, tl.uint32)
    hashed = _mix(hashed, tl.load(state + SEED_LOW * state_stride + slot).to(tl.uint32, bitcast=True))
    hashed = _mix(hashed, tl.load(state + SEED_HIGH * state_stride + slot).to(tl.uint32, bitcast=True))
    hashed = _mix(hashed, tl.load(state + CHOICE_INDEX * state_stride + slot).to(tl.uint32, bitcast=True))
    return _mix(hashed, position.to(tl.uint32, bitcast=True))


@triton.jit
def gumbel_noise_log2(hashed, token_ids):
    """Noise of int32 token ids in units of log 2 and less log2(log 2), which is the same for all; float32.

    Absolute error below 1e-5: the logarithm near 1 is a series, since the hardware's loses the largest noise there.
    """
    bits = _mix(hashed, token_ids.to(tl.uint32, bitcast=True)) ^ 20
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = bits ^ (bits >> 16)
    one_to_two = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    uniform = one_to_two - 0.999999940395355225  # 1 - 2**-24: exact, as is the next line
    rest = 1.0 - uniform
    series = (((rest * (LOG2_E / 5) + LOG2_E / 4) * rest + LOG2_E / 3) * rest + LOG2_E / 2) * rest + LOG2_E
    exponential = tl.where(rest < 0.0625, series * rest, -fast_log2(uniform))
    return -fast_log2(exponential)


@triton.jit
def _mix(hashed, word):
    word = word * 0xCC9E2D51
    word = ((word << 15) | (word >> 17)) * 0x1B873593
    hashed = hashed ^ word
    return ((hashed << 13) | (hashed >> 19)) * 5 + 0xE6546B64


@triton.jit
def ordered_key(values, KEY_BITS: tl.constexpr):
    """Integers that compare as float32 `values` do, int32; the highest 16 bits tell bfloat16 values apart."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - KEY_BITS)


@triton.jit
def fast_log2(values):
    """One instruction; absolute error 2e-7 for float32 between 0.5 and 2, relative error 2e-7 elsewhere."""
    if INTERPRETED:
        return tl.log2(values)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def fast_exp2(values):
    """One instruction; relative error 2e-7, float32 results below 1.2e-38 are 0."""
    if INTERPRETED:
        return tl.exp2(values)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
        )
