"""How the parts of one (row, kv head), which several programs attended to, become its attention.

Each program stores its part, and the one that arrives last combines them, in the order of the programs: same inputs,
same bits. Source of the combination: FlashDecoding, PyTorch blog, October 2023.
"""

import triton
import triton.language as tl


@triton.jit
def store_part(
    partial_values, partial_max, partial_sum, values, row_max, row_sum, is_beginning,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Leave what the program computed: values [ROWS, HEAD_DIM], not normalised, and its statistics [ROWS].

    A program leaves two parts at most: one that begins a (row, kv head), and one that does not.
    """
    heads, dims = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    place = (tl.program_id(0) * 2 + tl.where(is_beginning, 1, 0)) * GROUP + heads
    mask = heads < GROUP
    tl.store(partial_values + place[:, None] * HEAD_DIM + dims[None, :], values, mask=mask[:, None])
    tl.store(partial_max + place, row_max, mask=mask)
    tl.store(partial_sum + place, row_sum, mask=mask)


@triton.jit
def arrive(
    partial_values, partial_max, partial_sum, counters, first, last, target,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Say that a part is stored, of a (row, kv head) that programs first to last share; the last to say so combines.

    target: where the attention of the GROUP heads goes, [GROUP, HEAD_DIM].
    """
    tl.debug_barrier()  # the stores of all threads come before the release by the one that adds
    arrived = tl.atomic_add(counters + first, 1, sem="acq_rel", scope="gpu")
    if arrived == last - first:
        _combine(partial_values, partial_max, partial_sum, first, last, target, GROUP, GROUP_PADDED, HEAD_DIM)
        tl.store(counters + first, 0)


@triton.jit
def _combine(
    partial_values, partial_max, partial_sum, first, last, target,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write to target the attention that programs first to last have computed in parts.

    A thread reads its elements of every part, and their statistics, so that threads exchange nothing.
    """
    # At a time: all loads of them are in flight at once, and what they bring fits in the registers.
    PARTS: tl.constexpr = tl.constexpr(max(1, min(8, 4096 // (GROUP_PADDED * HEAD_DIM))))
    heads, dims = tl.arange(0, GROUP_PADDED)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    real_heads = tl.minimum(heads, GROUP - 1)  # the padding computes what the last head does
    total_max = tl.full([GROUP_PADDED, 1], float("-inf"), dtype=tl.float32)
    total_sum = tl.zeros([GROUP_PADDED, 1], dtype=tl.float32)
    total = tl.zeros([GROUP_PADDED, HEAD_DIM], dtype=tl.float32)
    for start in range(first, last + 1, PARTS):
        parts, maxima, sums, new_max = (), (), (), total_max
        for i in tl.static_range(PARTS):
            program = start + i
            place = (program * 2 + (program == first).to(tl.int32)) * GROUP + real_heads
            mask = real_heads < tl.where(program <= last, GROUP, 0)
            # Past L1, which may hold what an earlier launch wrote there.
            part = tl.load(partial_values + place * HEAD_DIM + dims, mask=mask, other=0.0, cache_modifier=".cg")
            part_max = tl.load(partial_max + place, mask=mask, other=float("-inf"), cache_modifier=".cg")
            part_sum = tl.load(partial_sum + place, mask=mask, other=0.0, cache_modifier=".cg")
            parts += (part,)
            maxima += (part_max,)
            sums += (part_sum,)
            new_max = tl.maximum(new_max, part_max)
        rescale = tl.exp2(total_max - new_max)
        total, total_sum, total_max = total * rescale, total_sum * rescale, new_max
        for i in tl.static_range(PARTS):
            weight = tl.exp2(maxima[i] - new_max)
            total += parts[i] * weight
            total_sum += sums[i] * weight
    result = (total / total_sum).to(target.dtype.element_ty)
    tl.store(target + heads * HEAD_DIM + dims, result, mask=heads < GROUP)
