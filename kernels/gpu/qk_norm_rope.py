"""What happens to queries, keys and values between their projection and the attention, in one kernel; and the KV store.

Both kernels work on heads of tokens as rows of one list, so that any number of heads fills a program.
kv_cache: [num_blocks, num_kv_heads, 2, block_size, head_dim], contiguous, keys at 0 and values at 1.
slot_mapping: [n] int32, block * block_size + offset; -1 = padding, nothing is stored.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor


def pick_config(num_rows: int, head_dim: int) -> tuple[int, int]:
    """(rows a program, warps a program). One load of a warp takes the halves of 512 / head_dim bf16 rows.

    Few rows spread over as many SMs as there are; many take two loads a thread, which hides the latency better.
    """
    rows = 512 // head_dim
    return (rows, 1) if num_rows <= 8192 else (8 * rows, 4)


def qk_norm_rope_store(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    rope_table: Tensor,
    kv_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    bias: Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    config: tuple[int, int] | None = None,
) -> None:
    """Add the bias, normalize query and key heads, rotate them, and store keys and values in the cache.

    qkv: [n, (num_heads + 2 * num_kv_heads) * head_dim], rows of any stride; becomes what it was turned into.
    positions: [n] int32, any valid ones for padding; rope_table: [max_len, head_dim] float32, the cosines of
    head_dim / 2 angles, then their sines; q_norm, k_norm: [head_dim] weights, both or none;
    bias: [(num_heads + 2 * num_kv_heads) * head_dim]. Each of the steps rounds to qkv's dtype.
    """
    head_dim, block_size = kv_cache.shape[4], kv_cache.shape[3]
    heads_per_token = num_heads + 2 * num_kv_heads
    num_rows = qkv.shape[0] * heads_per_token
    assert qkv.shape[1] == heads_per_token * head_dim
    assert qkv.stride(1) == 1
    assert kv_cache.is_contiguous()
    assert (q_norm is None) == (k_norm is None)
    rows_per_program, num_warps = config or pick_config(num_rows, head_dim)
    _qk_norm_rope_store_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        qkv,
        qkv.stride(0),
        positions,
        slot_mapping,
        rope_table,
        kv_cache,
        q_norm,
        k_norm,
        bias,
        eps,
        num_rows,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        BLOCK_SIZE=block_size,
        HAS_NORM=q_norm is not None,
        HAS_BIAS=bias is not None,
        ROWS=rows_per_program,
        num_warps=num_warps,
    )


def store_kv(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """k, v: [n, num_kv_heads, head_dim], tokens of any stride, heads contiguous."""
    num_tokens, num_kv_heads, head_dim = k.shape
    assert k.stride()[1:] == v.stride()[1:] == (head_dim, 1)
    assert kv_cache.is_contiguous()
    num_rows = num_tokens * num_kv_heads
    rows_per_program, num_warps = pick_config(num_rows, head_dim)
    _store_kv_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        k,
        v,
        k.stride(0),
        v.stride(0),
        kv_cache,
        slot_mapping,
        num_rows,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=kv_cache.shape[3],
        ROWS=rows_per_program,
        num_warps=num_warps,
    )


@triton.jit
def _cache_row(slot, kv_head, kind, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The row of head_dim elements that holds a slot's key (kind 0) or value (1) in the cache: int64."""
    block = (slot // BLOCK_SIZE).to(tl.int64)
    return ((block * NUM_KV_HEADS + kv_head) * 2 + kind) * BLOCK_SIZE + slot % BLOCK_SIZE


@triton.jit
def _load_halves(ptrs, mask, OTHER: tl.constexpr, HALF_DIM: tl.constexpr):
    return tl.load(ptrs, mask=mask, other=OTHER), tl.load(ptrs + HALF_DIM, mask=mask, other=OTHER)


@triton.jit
def _store_halves(ptrs, first, second, mask, HALF_DIM: tl.constexpr):
    tl.store(ptrs, first, mask=mask)
    tl.store(ptrs + HALF_DIM, second, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _qk_norm_rope_store_kernel(
    qkv_ptr,
    qkv_stride,
    positions_ptr,
    slot_mapping_ptr,
    rope_table_ptr,
    kv_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    bias_ptr,
    eps,
    num_rows,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    head_dim: tl.constexpr = 2 * HALF_DIM
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    token = row // (NUM_HEADS + 2 * NUM_KV_HEADS)
    head = row % (NUM_HEADS + 2 * NUM_KV_HEADS)
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    is_query = head < NUM_HEADS
    rotates = (exists & (head < NUM_HEADS + NUM_KV_HEADS))[:, None]
    pair = tl.arange(0, HALF_DIM)[None, :]
    mask = exists[:, None]

    # Loads that depend on nothing stand first: their latencies overlap.
    place = qkv_ptr + token.to(tl.int64)[:, None] * qkv_stride + (head * head_dim)[:, None] + pair
    first_raw, second_raw = _load_halves(place, mask, 0.0, HALF_DIM)
    position = tl.load(positions_ptr + token, mask=exists, other=0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token, mask=exists & ~is_query, other=-1)
    # Values are not rotated: the sine is 0 and the cosine, below, 1.
    cos, sin = _load_halves(rope_table_ptr + position[:, None] * head_dim + pair, rotates, 0.0, HALF_DIM)
    cos = tl.where(rotates, cos, 1.0)
    first, second = first_raw.to(tl.float32), second_raw.to(tl.float32)

    if HAS_BIAS:
        first_bias, second_bias = _load_halves(bias_ptr + (head * head_dim)[:, None] + pair, mask, 0.0, HALF_DIM)
        first = (first + first_bias.to(tl.float32)).to(dtype).to(tl.float32)
        second = (second + second_bias.to(tl.float32)).to(dtype).to(tl.float32)
    if HAS_NORM:
        weight_ptrs = tl.where(is_query[:, None], q_norm_ptr + pair, k_norm_ptr + pair)
        first_weight, second_weight = _load_halves(weight_ptrs, rotates, 0.0, HALF_DIM)
        scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / head_dim + eps)[:, None]
        first_normed = (first * scale * first_weight.to(tl.float32)).to(dtype)
        second_normed = (second * scale * second_weight.to(tl.float32)).to(dtype)
        first = tl.where(rotates, first_normed.to(tl.float32), first)
        second = tl.where(rotates, second_normed.to(tl.float32), second)
    first_out = (first * cos - second * sin).to(dtype)
    second_out = (second * cos + first * sin).to(dtype)

    # Without a bias a value is what it was.
    _store_halves(place, first_out, second_out, mask if HAS_BIAS else rotates, HALF_DIM)
    kind = is_value.to(tl.int32)
    cache_row = _cache_row(slot, head - NUM_HEADS - kind * NUM_KV_HEADS, kind, NUM_KV_HEADS, BLOCK_SIZE)
    target = kv_cache_ptr + cache_row[:, None] * head_dim + pair
    _store_halves(target, first_out, second_out, (slot >= 0)[:, None], HALF_DIM)


@triton.jit(do_not_specialize=["num_rows"])
def _store_kv_kernel(
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    kv_cache_ptr,
    slot_mapping_ptr,
    num_rows,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    element = tl.arange(0, HEAD_DIM)[None, :]
    slot = tl.load(slot_mapping_ptr + token, mask=row < num_rows, other=-1)
    mask = (slot >= 0)[:, None]
    source = token.to(tl.int64)[:, None]
    offset = (head * HEAD_DIM)[:, None] + element
    k = tl.load(k_ptr + source * k_stride + offset, mask=mask)
    v = tl.load(v_ptr + source * v_stride + offset, mask=mask)
    target = kv_cache_ptr + element
    tl.store(target + _cache_row(slot, head, 0, NUM_KV_HEADS, BLOCK_SIZE)[:, None] * HEAD_DIM, k, mask=mask)
    tl.store(target + _cache_row(slot, head, 1, NUM_KV_HEADS, BLOCK_SIZE)[:, None] * HEAD_DIM, v, mask=mask)
