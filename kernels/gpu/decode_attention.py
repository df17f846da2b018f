"""Paged attention of one query token a sequence: the programs share the batch's keys and values.

Each works on what the step's schedule gives it, in tiles of tokens of one sequence and one kv head, so that ragged
batches are balanced to a tile and a single long sequence uses the whole chip: `decode_split`. Where a (row, kv head)
is in several programs, each leaves its part and the one that arrives last combines them: `decode_combine`.
"""

# pyright: reportCallIssue=false
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.decode_combine import arrive, store_part
from kernels.gpu.decode_lanes import MAX_QUERY_SIZE, attend_by_lanes, lane_groups
from kernels.gpu.decode_split import (
    BLOCK_ID,
    FIRST_PROGRAM,
    FIRST_TILE,
    HAS_EMPTY,
    KV_HEAD,
    LAST_PROGRAM,
    LENGTH,
    NUM_TILES,
    ROW,
    SLOT,
    Split,
    looked_after,
    tile_size,
)
from kernels.gpu.interpreted import INTERPRETED

_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel is launched: none of it changes what is computed, beyond rounding."""

    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 3
    max_items: int = 264  # see Split
    min_share: int = 1  # see Split

    @property
    def max_registers(self) -> int:
        """Of a thread, so that programs_per_sm programs fit: a multiple of 8, 255 at most."""
        return min(255, 65536 // (32 * self.num_warps * self.programs_per_sm) // 8 * 8)


@dataclass(frozen=True)
class Workspace:
    """Where programs leave parts of a result, made once; two launches must not use one at the same time.

    A program leaves two at most: at 1 one that begins a (row, kv head), at 0 one that does not.
    """

    num_kv_heads: int
    partial_values: Tensor  # [num_programs, 2, group, head_dim] float32, not normalised
    partial_max: Tensor  # [num_programs, 2, group] float32, base 2
    partial_sum: Tensor  # [num_programs, 2, group] float32
    counters: Tensor  # [num_programs] int32, arrivals at the (row, kv head) that the program began; 0 between launches
    config: DecodeConfig

    @property
    def split(self) -> Split:
        """What a schedule must be made for."""
        return Split(len(self.counters), self.num_kv_heads, self.config.max_items, self.config.min_share)


def make_workspace(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    config: DecodeConfig | None = None,
    num_programs: int | None = None,
) -> Workspace:
    """A workspace for any batch; num_programs defaults to the multiprocessors times config.programs_per_sm."""
    config = config or DecodeConfig()
    if num_programs is None:
        num_programs = _num_multiprocessors(device) * config.programs_per_sm
    shape = (num_programs, 2, num_heads // num_kv_heads)
    return Workspace(
        num_kv_heads=num_kv_heads,
        partial_values=torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        partial_max=torch.empty(shape, dtype=torch.float32, device=device),
        partial_sum=torch.empty(shape, dtype=torch.float32, device=device),
        counters=torch.zeros(num_programs, dtype=torch.int32, device=device),
        config=config,
    )


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def paged_decode_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    row_slots: Tensor,
    context_lens: Tensor,
    schedule: Tensor,
    workspace: Workspace,
) -> Tensor:
    """Attend from the newest token of each row to its whole context; rows of length 0 become zeros.

    q: [batch, heads, head_dim], rows may be strided; kv_cache: [num_blocks, kv_heads, 2, block_size, head_dim];
    block_tables: [num_slots, max_blocks] int32; row_slots: [batch] int32; context_lens: [batch] int32;
    schedule: [NUM_FIELDS, num_programs] int32, of these rows and workspace.split, see `decode_split`.
    Returns [batch, heads, head_dim].
    """
    batch, num_heads, head_dim = q.shape
    _, num_kv_heads, _, block_size, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    tile = tile_size(block_size)
    group_padded = triton.next_power_of_2(group)
    by_lanes = group_padded * head_dim <= MAX_QUERY_SIZE
    lanes = lane_groups(workspace.config.num_warps, head_dim, q.element_size(), tile) if by_lanes else 0
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _decode_kernel[(workspace.split.num_programs,)](
        q,
        q.stride(0),
        kv_cache,
        block_tables,
        block_tables.stride(0),
        row_slots,
        context_lens,
        schedule,
        batch,
        out,
        workspace.partial_values,
        workspace.partial_max,
        workspace.partial_sum,
        workspace.counters,
        head_dim**-0.5,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PADDED=group_padded,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=tile,
        LANES=lanes,
        num_warps=workspace.config.num_warps,
        num_stages=workspace.config.num_stages,
        maxnreg=workspace.config.max_registers,
    )
    return out


@triton.jit(do_not_specialize=["batch"])
def _decode_kernel(
    q, q_stride, kv_cache, block_tables, table_stride, row_slots, context_lens, schedule, batch, out,
    partial_values, partial_max, partial_sum, counters, scale,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Work on the program's tiles, one (row, kv head) after another. LANES: 0 for tensor cores, see `decode_lanes`."""
    BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * 2 * BLOCK_SIZE * HEAD_DIM
    ROWS: tl.constexpr = tl.constexpr(GROUP_PADDED if LANES else max(16, GROUP_PADDED))  # of a tl.dot: 16 at least
    program = tl.program_id(0)
    heads, dims = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    element = heads[:, None] * HEAD_DIM + dims[None, :]
    mask = (heads < GROUP)[:, None]

    row, slot = _load_field(schedule, ROW), _load_field(schedule, SLOT)
    length, kv_head = _load_field(schedule, LENGTH), _load_field(schedule, KV_HEAD)
    tile, block = _load_field(schedule, FIRST_TILE), _load_field(schedule, BLOCK_ID)
    first, last = _load_field(schedule, FIRST_PROGRAM), _load_field(schedule, LAST_PROGRAM)
    remaining, has_empty = _load_field(schedule, NUM_TILES), _load_field(schedule, HAS_EMPTY)
    if has_empty:
        _clear_empty_rows(context_lens, batch, out, element, mask, NUM_KV_HEADS, GROUP * HEAD_DIM)
    while remaining > 0:
        num_tiles = tl.cdiv(length, TILE)
        end = tl.minimum(tile + remaining, num_tiles)
        queries = q + row.to(tl.int64) * q_stride + kv_head * (GROUP * HEAD_DIM)
        head_cache = kv_cache + kv_head * (2 * BLOCK_SIZE * HEAD_DIM)
        table = block_tables + slot.to(tl.int64) * table_stride
        if LANES:
            values, row_max, row_sum, block = attend_by_lanes(
                queries, head_cache, table, block, length, tile, end, scale * _LOG2_E, BLOCK_STRIDE, HEAD_DIM,
                BLOCK_SIZE, TILE, GROUP, ROWS, LANES,
            )  # fmt: skip
        else:
            values, row_max, row_sum, block = _attend(
                queries, head_cache, table, block, length, tile, end, scale * _LOG2_E, BLOCK_STRIDE, HEAD_DIM,
                BLOCK_SIZE, TILE, GROUP, ROWS,
            )  # fmt: skip
        target = out + (row.to(tl.int64) * NUM_KV_HEADS + kv_head) * (GROUP * HEAD_DIM)
        if end - tile == num_tiles:
            tl.store(target + element, (values / row_sum[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            store_part(
                partial_values, partial_max, partial_sum, values, row_max, row_sum, tile == 0, GROUP, ROWS, HEAD_DIM
            )
            arrive(
                partial_values, partial_max, partial_sum, counters, tl.where(tile == 0, program, first),
                tl.where(end == num_tiles, program, last), target, GROUP, GROUP_PADDED, HEAD_DIM,
            )  # fmt: skip
        remaining -= end - tile
        tile, kv_head = 0, kv_head + 1
        if (kv_head == NUM_KV_HEADS) & (remaining > 0):
            kv_head, length = 0, 0
            while length == 0:
                row += 1
                length = tl.load(context_lens + row)
            slot = tl.load(row_slots + row)
            block = tl.load(block_tables + slot.to(tl.int64) * table_stride)


@triton.jit
def _load_field(schedule, FIELD: tl.constexpr):
    """Of the program. Volatile: the compiler would put off those that a program without tiles does not need."""
    return tl.load(schedule + FIELD * tl.num_programs(0) + tl.program_id(0), volatile=True)


@triton.jit
def _clear_empty_rows(context_lens, batch, out, element, mask, NUM_KV_HEADS: tl.constexpr, STRIDE: tl.constexpr):
    """Write zeros for those rows that the program looks after and that have no context, hence no tiles."""
    row = looked_after(tl.program_id(0), tl.num_programs(0))
    while row < batch:
        if tl.load(context_lens + row) == 0:
            for kv_head in range(NUM_KV_HEADS):
                target = out + (row.to(tl.int64) * NUM_KV_HEADS + kv_head) * STRIDE
                tl.store(target + element, tl.zeros(element.shape, dtype=out.dtype.element_ty), mask=mask)
        row += tl.num_programs(0)


@triton.jit
def _attend(
    q, kv_head_cache, block_table, block, length, first_tile, end_tile, scale,
    BLOCK_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Softmax attention, not normalised, over some tiles of one context; scale includes log2(e).

    q: [GROUP, HEAD_DIM]; block: the one that holds first_tile. Returns values [ROWS, HEAD_DIM], largest scores
    [ROWS] and sums of weights [ROWS], and the first block of the context.
    """
    TILES_PER_BLOCK: tl.constexpr = BLOCK_SIZE // TILE
    offsets, heads, dims = tl.arange(0, TILE), tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    element = offsets[:, None] * HEAD_DIM + dims[None, :]
    head_element, is_head = heads[:, None] * HEAD_DIM + dims[None, :], (heads < GROUP)[:, None]
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([ROWS, TILE], dtype=tl.float32)  # of weights, added up at the end: no exchange between warps
    values = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    for tile in range(first_tile, end_tile):
        start = kv_head_cache + block.to(tl.int64) * BLOCK_STRIDE + (tile % TILES_PER_BLOCK) * (TILE * HEAD_DIM)
        # One iteration ahead, so that the pipeline's loads never wait for an address; at the end, for the next head.
        following = tl.where(tile + 1 < end_tile, tile + 1, 0)
        block = tl.load(block_table + following // TILES_PER_BLOCK)
        # In the loop, hence in its pipeline: before it, the first keys would wait for them. The minimum is 0.
        queries = tl.load(q + tl.minimum(tile, 0) * HEAD_DIM + head_element, mask=is_head, other=0.0)
        is_visible = offsets < length - tile * TILE  # what lies beyond may be anything, NaN too
        keys = tl.load(start + element, mask=is_visible[:, None], other=0.0)
        tile_values = tl.load(start + BLOCK_SIZE * HEAD_DIM + element, mask=is_visible[:, None], other=0.0)
        scores = tl.where(is_visible[None, :], _dot(queries, keys.T), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores * scale - (new_largest * scale)[:, None])
        rescale = tl.exp2((largest - new_largest) * scale)
        sums = sums * rescale[:, None] + weights
        values = values * rescale[:, None] + _dot(weights.to(tile_values.dtype), tile_values)
        largest = new_largest
    return values, largest * scale, tl.sum(sums, axis=1), block


@triton.jit
def _dot(a, b):
    """a @ b, accumulated in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")
