"""Causal attention of chunks of prompts over the paged cache, which already holds the chunks' own keys and values.

A program takes one kv head and a tile of BLOCK_M rows: consecutive tokens of one sequence, each with the group of
query heads that share the kv head, so that what it loads serves them all. Programs find their tile on the device by
an upper bound of the tiles before each sequence, as in vLLM's unified attention; those without a tile exit at once.
Source of the online softmax: FlashAttention-2, arXiv:2307.08691.
"""

# pyright: reportCallIssue=false
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.interpreted import INTERPRETED

_SEARCH = tl.constexpr(64)
_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class PrefillConfig:
    """How the kernel is launched: none of it changes what is computed, beyond rounding."""

    block_m: int = 128  # rows of a tile
    block_n: int = 64  # tokens of the context at a time
    num_warps: int = 8
    num_stages: int = 3


CONFIGS = {torch.bfloat16: PrefillConfig(), torch.float32: PrefillConfig(block_m=32, block_n=32)}


def num_tiles(num_tokens: int, num_seqs: int, group: int, config: PrefillConfig) -> int:
    """Upper bound of the tiles of num_tokens queries, in num_seqs sequences, of group query heads a kv head."""
    return num_tokens // (config.block_m // group) + num_seqs


def paged_prefill_attention(
    q: Tensor,
    kv_cache: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    seq_slots: Tensor,
    block_tables: Tensor,
    max_tiles: int,
    config: PrefillConfig,
) -> Tensor:
    """Attend from each token of the chunks to its own context: sequence s has rows query_starts[s] to [s + 1] of q.

    q: [n, heads, head_dim], rows may be strided; kv_cache: [num_blocks, kv_heads, 2, block_size, head_dim];
    query_starts: [num_seqs + 1] int32, from 0; context_lens: [num_seqs] int32, the chunk included, which ends it;
    seq_slots: [num_seqs] int32; block_tables: [num_slots, max_blocks] int32; max_tiles: at least what num_tiles says.
    Returns [n, heads, head_dim]; rows of no sequence are not written.
    """
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, _, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _prefill_kernel[(num_kv_heads, max_tiles)](
        q,
        q.stride(0),
        kv_cache,
        query_starts,
        context_lens,
        seq_slots,
        len(context_lens),
        block_tables,
        block_tables.stride(0),
        out,
        head_dim**-0.5,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@triton.jit(do_not_specialize=["num_seqs"])
def _prefill_kernel(
    q,
    q_stride,
    kv_cache,
    query_starts,
    context_lens,
    seq_slots,
    num_seqs,
    block_tables,
    table_stride,
    out,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Row m of a tile is query token m // GROUP of the tile and head m % GROUP of the group."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the ends of sequences, the longest tiles, start first
    seq = _find_sequence(query_starts, num_seqs, tile, BLOCK_Q)
    query_start = tl.load(query_starts + seq)
    num_queries = tl.load(query_starts + seq + 1) - query_start
    first_query = (tile - query_start // BLOCK_Q - seq) * BLOCK_Q
    if first_query < num_queries:
        rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
        queries_of_rows = first_query + rows // GROUP
        mask = ((rows < BLOCK_Q * GROUP) & (queries_of_rows < num_queries))[:, None]
        tokens = (query_start + queries_of_rows).to(tl.int64)
        heads = kv_head * GROUP + rows % GROUP
        element = (heads * HEAD_DIM)[:, None] + dims[None, :]
        queries = tl.load(q + (tokens * q_stride)[:, None] + element, mask=mask, other=0.0)

        num_before = tl.load(context_lens + seq) - num_queries  # tokens of the context before the chunk
        positions = num_before + queries_of_rows
        end = num_before + tl.minimum(first_query + BLOCK_Q, num_queries)  # the last row sees the tokens before it
        num_full_tiles = (num_before + first_query + 1) // BLOCK_N  # tiles that every row sees entirely
        cache = kv_cache + kv_head * (2 * BLOCK_SIZE * HEAD_DIM)
        block_table = block_tables + tl.load(seq_slots + seq).to(tl.int64) * table_stride
        BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * 2 * BLOCK_SIZE * HEAD_DIM

        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        values = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
        values, row_max, row_sum = _attend(
            values, row_max, row_sum, queries, positions, cache, block_table, 0, num_full_tiles, end, scale * _LOG2_E,
            BLOCK_STRIDE, HEAD_DIM, BLOCK_SIZE, BLOCK_N, MASKED=False,
        )  # fmt: skip
        values, row_max, row_sum = _attend(
            values, row_max, row_sum, queries, positions, cache, block_table, num_full_tiles, tl.cdiv(end, BLOCK_N),
            end, scale * _LOG2_E, BLOCK_STRIDE, HEAD_DIM, BLOCK_SIZE, BLOCK_N, MASKED=True,
        )  # fmt: skip
        result = (values / row_sum[:, None]).to(out.dtype.element_ty)
        tl.store(out + (tokens * (NUM_KV_HEADS * GROUP * HEAD_DIM))[:, None] + element, result, mask=mask)


@triton.jit
def _attend(
    values,
    row_max,
    row_sum,
    queries,
    positions,
    cache,
    block_table,
    first_tile,
    end_tile,
    end,
    scale,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add some tiles of keys and values to the softmax attention of queries, not normalised.

    values: [rows, HEAD_DIM]; row_max, row_sum: [rows], the largest scores in base 2 and the sums of weights;
    positions: [rows] of the queries. Tokens from `end` on are not loaded. scale includes log2(e).
    """
    offsets, dims = tl.arange(0, BLOCK_N), tl.arange(0, HEAD_DIM)
    # One iteration ahead, so that the pipeline's loads never wait for an address.
    tokens = first_tile * BLOCK_N + offsets
    next_blocks = tl.load(block_table + tokens // BLOCK_SIZE, mask=tokens < end, other=0)
    for tile in range(first_tile, end_tile):
        tokens = tile * BLOCK_N + offsets
        blocks = next_blocks.to(tl.int64)
        next_blocks = tl.load(block_table + (tokens + BLOCK_N) // BLOCK_SIZE, mask=tokens + BLOCK_N < end, other=0)
        keys_at = cache + (blocks * BLOCK_STRIDE + tokens % BLOCK_SIZE * HEAD_DIM)[:, None] + dims[None, :]
        if MASKED:
            keys = tl.load(keys_at, mask=(tokens < end)[:, None], other=0.0)
            tile_values = tl.load(keys_at + BLOCK_SIZE * HEAD_DIM, mask=(tokens < end)[:, None], other=0.0)
        else:
            keys = tl.load(keys_at)
            tile_values = tl.load(keys_at + BLOCK_SIZE * HEAD_DIM)
        scores = _dot(queries, keys.T)
        if MASKED:
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        values = _dot(weights.to(tile_values.dtype), tile_values, values * rescale[:, None])
        row_max = new_max
    return values, row_max, row_sum


@triton.jit
def _dot(a, b, c=None):
    """a @ b + c, accumulated in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _find_sequence(query_starts, num_seqs, tile, BLOCK_Q: tl.constexpr):
    """The sequence that a tile belongs to: the last one before which the bound counts at most that many tiles."""
    seq = -1
    for start in range(0, num_seqs, _SEARCH):
        seqs = start + tl.arange(0, _SEARCH)
        starts = tl.load(query_starts + seqs, mask=seqs < num_seqs, other=0)
        seq += tl.sum(((seqs < num_seqs) & (starts // BLOCK_Q + seqs <= tile)).to(tl.int32), axis=0)
    return seq
