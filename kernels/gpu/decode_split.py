"""How decode attention splits a batch over programs: the schedule, written on the device once a step.

The unit of work is a tile of one (row, kv head). A program works on consecutive tiles of the list of all tiles,
ordered by (row, kv head, position): a part of a (row, kv head), or the rest of one, some whole ones, and a beginning.
- Few rows: every program gets one part, and all parts of a row have as many tiles, to one: latency counts.
- Many rows: every program gets as many tiles, to one, wherever that cuts the list (Stream-K, arXiv:2301.03598).
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a schedule, [NUM_FIELDS, num_programs] int32. A program without tiles has valid NUM_TILES and HAS_EMPTY only.
ROW = tl.constexpr(0)
SLOT = tl.constexpr(1)  # of the row
LENGTH = tl.constexpr(2)  # tokens, of the row's context
KV_HEAD = tl.constexpr(3)
FIRST_TILE = tl.constexpr(4)  # of the (row, kv head)
BLOCK_ID = tl.constexpr(5)  # the cache block of that tile
NUM_TILES = tl.constexpr(6)  # that the program works on
FIRST_PROGRAM = tl.constexpr(7)  # the one that begins the program's first (row, kv head)
LAST_PROGRAM = tl.constexpr(8)  # the one that ends the program's last (row, kv head); valid if that is another one
HAS_EMPTY = tl.constexpr(9)  # whether a row that the program looks after has no context, see `looked_after`
NUM_FIELDS = tl.constexpr(10)


@dataclasses.dataclass(frozen=True)
class Split:
    """What a schedule is made for."""

    num_programs: int
    num_kv_heads: int
    max_items: int  # at most so many programs get one part each; used where there are two for every (row, kv head)
    min_share: int  # tiles; a part has as many, unless the context is too short


def tile_size(block_size: int) -> int:
    """Tokens in a tile; block_size: a power of two, 16 at least."""
    return min(block_size, 64)


def empty_schedule(split: Split, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for a schedule, and [batch] int32 of scratch for its making."""
    shape = (NUM_FIELDS.value, split.num_programs)
    return tuple(torch.empty(size, dtype=torch.int32, device=device) for size in (shape, batch))  # pyright: ignore[reportReturnType]


def make_schedule(
    context_lens: Tensor, row_slots: Tensor, block_tables: Tensor, block_size: int, split: Split
) -> Tensor:
    """A schedule for a batch outside of a step, whose first kernel writes its own: [NUM_FIELDS, num_programs] int32.

    context_lens, row_slots: [batch] int32; block_tables: [num_slots, max_blocks] int32.
    """
    batch = len(context_lens)
    schedule, starts = empty_schedule(split, batch, context_lens.device)
    _schedule_kernel[(1,)](
        schedule, starts, context_lens, row_slots, batch, block_tables, block_tables.stride(0),
        min(split.max_items, split.num_programs), split.min_share, NUM_PROGRAMS=split.num_programs,
        NUM_KV_HEADS=split.num_kv_heads, TILE=tile_size(block_size), BLOCK_SIZE=block_size,
        BLOCK=triton.next_power_of_2(batch), num_warps=8,
    )  # fmt: skip
    return schedule


@triton.jit(do_not_specialize=["batch", "table_stride", "max_items", "min_share"])
def _schedule_kernel(
    schedule, starts, context_lens, row_slots, batch, block_tables, table_stride, max_items, min_share,
    NUM_PROGRAMS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BLOCK)
    write_schedule(
        schedule, starts, context_lens, row_slots, batch, tl.load(context_lens + rows, mask=rows < batch, other=0),
        block_tables, table_stride, max_items, min_share, NUM_PROGRAMS, NUM_KV_HEADS, TILE, BLOCK_SIZE, BLOCK,
    )  # fmt: skip


@triton.jit
def write_schedule(
    schedule, starts, context_lens, row_slots, batch, lengths, block_tables, table_stride, max_items, min_share,
    NUM_PROGRAMS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the schedule of a batch, by one program of any number of warps.

    lengths: [BLOCK], what context_lens holds, then zeros; context_lens, row_slots and block_tables may have been
    stored before in the same kernel. starts: [batch] int32, scratch. max_items: up to NUM_PROGRAMS.
    """
    rows = tl.arange(0, BLOCK)
    tiles = tl.cdiv(lengths, TILE)
    in_parts, part = _choose_part(tiles, max_items, min_share, NUM_KV_HEADS)
    # The list that is cut: of parts, each for one program, or of single tiles.
    units = tl.cdiv(tiles, part)
    num_units = tl.sum(units) * NUM_KV_HEADS
    tl.store(starts + rows, tl.cumsum(units, 0) - units, mask=rows < batch)
    tl.debug_barrier()  # makes the stores visible to all threads

    program = tl.arange(0, triton.next_power_of_2(NUM_PROGRAMS))
    share, extra = num_units // NUM_PROGRAMS, num_units % NUM_PROGRAMS
    begin = tl.where(in_parts, program, _range_start(program, share, extra))
    end = tl.where(in_parts, program + 1, _range_start(program + 1, share, extra))
    row = _find_row(starts, batch, begin // NUM_KV_HEADS, BLOCK)
    slot, length = tl.load(row_slots + row), tl.load(context_lens + row)
    num_tiles = tl.cdiv(length, TILE)
    head_units = tl.maximum(tl.cdiv(num_tiles, part), 1)
    in_row = begin - tl.load(starts + row) * NUM_KV_HEADS
    kv_head, unit = in_row // head_units, in_row % head_units
    first_tile = unit * num_tiles // head_units  # a single tile is its own unit
    end_tile = (unit + end - begin) * num_tiles // head_units  # counted on through the heads behind
    head_start, head_end = begin - unit, begin - unit + head_units - 1
    first_program = tl.where(in_parts, head_start, _owner(head_start, share, extra))
    last_program = tl.where(in_parts, head_end, _owner(head_end, share, extra))
    works = begin < tl.minimum(end, num_units)
    table = block_tables + slot.to(tl.int64) * table_stride
    block = tl.load(table + first_tile // (BLOCK_SIZE // TILE), mask=works & (program < NUM_PROGRAMS), other=0)
    has_empty = _looks_after_empty(context_lens, batch, program, NUM_PROGRAMS)

    _store_field(schedule, ROW, row, NUM_PROGRAMS)
    _store_field(schedule, SLOT, slot, NUM_PROGRAMS)
    _store_field(schedule, LENGTH, length, NUM_PROGRAMS)
    _store_field(schedule, KV_HEAD, kv_head, NUM_PROGRAMS)
    _store_field(schedule, FIRST_TILE, first_tile, NUM_PROGRAMS)
    _store_field(schedule, BLOCK_ID, block, NUM_PROGRAMS)
    _store_field(schedule, NUM_TILES, tl.where(works, end_tile - first_tile, 0), NUM_PROGRAMS)
    _store_field(schedule, FIRST_PROGRAM, first_program, NUM_PROGRAMS)
    # Where a program's last (row, kv head) goes on, it is the first one of the next program.
    before = schedule + LAST_PROGRAM * NUM_PROGRAMS + program - 1
    tl.store(before, last_program, mask=(program > 0) & (program < NUM_PROGRAMS))
    _store_field(schedule, HAS_EMPTY, tl.where(has_empty, 1, 0), NUM_PROGRAMS)


@triton.jit
def _store_field(schedule, FIELD: tl.constexpr, values, NUM_PROGRAMS: tl.constexpr):
    program = tl.arange(0, values.shape[0])
    tl.store(schedule + FIELD * NUM_PROGRAMS + program, values, mask=program < NUM_PROGRAMS)


@triton.jit
def _choose_part(tiles, max_items, min_share, NUM_KV_HEADS: tl.constexpr):
    """Whether every program gets one part, and the tiles of the largest: the fewest with which max_items suffice."""
    total = tl.sum(tiles) * NUM_KV_HEADS
    num_heads = tl.sum((tiles > 0).to(tl.int32)) * NUM_KV_HEADS
    in_parts = num_heads * 2 <= max_items
    part = tl.full([], 1, dtype=tl.int32)
    if in_parts:
        part = tl.maximum(tl.cdiv(total, tl.maximum(max_items, 1)), min_share)
        # Enough: rounding up adds less than a part to every (row, kv head).
        enough = tl.maximum(tl.cdiv(total, tl.maximum(max_items - num_heads, 1)), part)
        while part < enough:
            middle = (part + enough) // 2
            fits = tl.sum(tl.cdiv(tiles, middle)) * NUM_KV_HEADS <= max_items
            part, enough = tl.where(fits, part, middle + 1), tl.where(fits, middle, enough)
    return in_parts, part


@triton.jit
def _find_row(starts, batch, unit, BLOCK: tl.constexpr):
    """The last row that starts at a unit or before it, by bisection: not an empty row if the unit exists."""
    row = unit * 0
    for level in tl.static_range(1, 17):
        if (BLOCK >> level) > 0:
            later = row + (BLOCK >> level)
            start = tl.load(starts + later, mask=later < batch, other=2147483647)
            row = tl.where(start <= unit, later, row)
    return row


@triton.jit
def looked_after(program, num_programs):
    """The first row that a program clears if it is empty; the others follow every num_programs rows.

    The last programs begin: with few rows they have no work.
    """
    return num_programs - 1 - program


@triton.jit
def _looks_after_empty(context_lens, batch, program, NUM_PROGRAMS: tl.constexpr):
    row = looked_after(program, NUM_PROGRAMS)
    has_empty = row < -NUM_PROGRAMS  # none
    for start in range(0, batch, NUM_PROGRAMS):
        length = tl.load(context_lens + start + row, mask=(row >= 0) & (start + row < batch), other=1)
        has_empty = has_empty | (length == 0)
    return has_empty


@triton.jit
def _range_start(program, share, extra):
    """Where a program's range begins: the first `extra` programs have share + 1 tiles, the others share."""
    return program * share + tl.minimum(program, extra)


@triton.jit
def _owner(position, share, extra):
    """The program whose range holds a position."""
    boundary = extra * (share + 1)
    return tl.where(position < boundary, position // (share + 1), extra + (position - boundary) // tl.maximum(share, 1))
