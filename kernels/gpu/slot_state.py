"""The state of every running sequence on the device, dense by slot: how sequences enter it and prefill reads it.

state: [NUM_FIELDS, num_slots] int32, one row a field. Entries of empty slots mean nothing.
block_tables: [num_slots, max_blocks] int32. stop_token_ids: [num_slots, max_stops] int32, the first NUM_STOPS count.
"""

# pyright: reportCallIssue=false

import dataclasses
from collections.abc import Sequence

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from kernels.gpu.interpreted import INTERPRETED

# Rows of `state`.
LAST_TOKEN = tl.constexpr(0)  # the input of the next decode step
CONTEXT_LEN = tl.constexpr(1)  # positions with KV entries
MAX_TOTAL = tl.constexpr(2)  # tokens at which the sequence ends
DONE = tl.constexpr(3)  # 1: samples nothing until the slot is taken again
TEMPERATURE = tl.constexpr(4)  # bits of a float32, as TOP_P and MIN_P are
TOP_K = tl.constexpr(5)
TOP_P = tl.constexpr(6)
MIN_P = tl.constexpr(7)
SEED_LOW = tl.constexpr(8)
SEED_HIGH = tl.constexpr(9)
CHOICE_INDEX = tl.constexpr(10)
NUM_STOPS = tl.constexpr(11)
NUM_FIELDS = tl.constexpr(12)

RECORD = np.dtype([
    ("slot", "<i4"),
    # The fields of `state`, in its order.
    ("last_token", "<i4"), ("context_len", "<i4"), ("max_total", "<i4"), ("done", "<i4"), ("temperature", "<f4"),
    ("top_k", "<i4"), ("top_p", "<f4"), ("min_p", "<f4"), ("seed", "<u8"), ("choice_index", "<i4"),
    ("num_stops", "<i4"),
    # Offsets count int32 from the start of the staging buffer.
    ("num_blocks", "<i4"), ("blocks_offset", "<i4"), ("stops_offset", "<i4"),
])  # fmt: skip
RECORD_SIZE = tl.constexpr(RECORD.itemsize // 4)  # int32


@dataclasses.dataclass(frozen=True)
class Admission:
    """A sequence that takes a slot; the fields mean what they mean in executor.proto."""

    slot: int
    context_len: int  # leading positions whose KV entries are in block_ids already
    max_total: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int  # unsigned 64 bits
    choice_index: int
    block_ids: NDArray[np.int32]  # [any], at most max_blocks
    stop_token_ids: NDArray[np.int32]  # [any], at most max_stops


def packed_size(sequences: Sequence[Admission]) -> int:
    """How many int32 `pack` writes."""
    return sum(RECORD_SIZE.value + len(one.block_ids) + len(one.stop_token_ids) for one in sequences)


def pack(sequences: Sequence[Admission], out: NDArray[np.int32]) -> int:
    """Write what `admit` reads to the start of `out` ([packed_size or more] int32); returns the int32 written."""
    end = RECORD_SIZE.value * len(sequences)
    records = out[:end].view(RECORD)
    for index, one in enumerate(sequences):
        blocks_offset, stops_offset = end, end + len(one.block_ids)
        end = stops_offset + len(one.stop_token_ids)
        out[blocks_offset:stops_offset] = one.block_ids
        out[stops_offset:end] = one.stop_token_ids
        records[index] = (
            one.slot, 0, one.context_len, one.max_total, 0, one.temperature, min(one.top_k, 2**31 - 1), one.top_p,
            one.min_p, one.seed, one.choice_index, len(one.stop_token_ids), len(one.block_ids), blocks_offset,
            stops_offset,
        )  # fmt: skip
    return end


def admit(staging: Tensor, num_sequences: int, state: Tensor, stop_token_ids: Tensor, block_tables: Tensor) -> None:
    """Fill the slots of sequences that `pack` wrote to staging: [any] int32; the slots are distinct."""
    if num_sequences:
        _admit_kernel[(num_sequences,)](
            staging, state, state.stride(0), stop_token_ids, stop_token_ids.stride(0), stop_token_ids.shape[1],
            block_tables, block_tables.stride(0), block_tables.shape[1], BLOCK=128, num_warps=4,
        )  # fmt: skip


@triton.jit
def _admit_kernel(
    staging, state, state_stride, stop_token_ids, stops_stride, max_stops, block_tables, tables_stride, max_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    record = staging + tl.program_id(0) * RECORD_SIZE
    slot = tl.load(record).to(tl.int64)
    fields = tl.arange(0, triton.next_power_of_2(NUM_FIELDS))
    is_field = fields < NUM_FIELDS
    values = tl.load(record + 1 + fields, mask=is_field)
    tl.store(state + fields * state_stride + slot, values, mask=is_field)

    num_stops = tl.minimum(tl.load(record + 1 + NUM_STOPS), max_stops)
    num_blocks = tl.minimum(tl.load(record + 1 + NUM_FIELDS), max_blocks)
    blocks = staging + tl.load(record + 2 + NUM_FIELDS)
    stops = staging + tl.load(record + 3 + NUM_FIELDS)
    for start in range(0, num_blocks, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        ids = tl.load(blocks + columns, mask=columns < num_blocks)
        tl.store(block_tables + slot * tables_stride + columns, ids, mask=columns < num_blocks)
    for start in range(0, num_stops, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        ids = tl.load(stops + columns, mask=columns < num_stops)
        tl.store(stop_token_ids + slot * stops_stride + columns, ids, mask=columns < num_stops)


def prefill_inputs(
    chunks: Tensor, state: Tensor, block_tables: Tensor, clock: Tensor, positions: Tensor, slot_mapping: Tensor,
    block_size: int, max_count: int,
) -> None:  # fmt: skip
    """Where the tokens of prefill chunks stand, and that their slots will hold them.

    chunks: [4, num_chunks] int32, by column slot, first position, count (0: padding, nothing is read or written) and
    first row; max_count bounds the counts.
    positions, slot_mapping: [n] int32, of which the chunks' rows are written. state: CONTEXT_LEN becomes each chunk's
    end. clock: [1] int64, set to the device's time in ns.
    """
    block = 256
    _prefill_inputs_kernel[(chunks.shape[1], max(triton.cdiv(max_count, block), 1))](
        chunks, chunks.stride(0), state, state.stride(0), block_tables, block_tables.stride(0), clock, positions,
        slot_mapping, BLOCK_SIZE=block_size, BLOCK=block, num_warps=4,
    )  # fmt: skip


@triton.jit
def _prefill_inputs_kernel(
    chunks, chunks_stride, state, state_stride, block_tables, tables_stride, clock, positions, slot_mapping,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, part = tl.program_id(0), tl.program_id(1)
    if (chunk == 0) & (part == 0):
        tl.store(clock, device_time())
    count = tl.load(chunks + 2 * chunks_stride + chunk)
    if part * BLOCK < count:
        slot = tl.load(chunks + chunk).to(tl.int64)
        first = tl.load(chunks + chunks_stride + chunk)
        first_row = tl.load(chunks + 3 * chunks_stride + chunk)
        offsets = part * BLOCK + tl.arange(0, BLOCK)
        is_token = offsets < count
        places = first + offsets
        blocks = tl.load(block_tables + slot * tables_stride + places // BLOCK_SIZE, mask=is_token)
        tl.store(positions + first_row + offsets, places, mask=is_token)
        tl.store(slot_mapping + first_row + offsets, blocks * BLOCK_SIZE + places % BLOCK_SIZE, mask=is_token)
        if part == 0:
            tl.store(state + CONTEXT_LEN * state_stride + slot, first + count)


@triton.jit
def device_time():
    """Nanoseconds of the device's clock, int64; 0 in the interpreter."""
    if INTERPRETED:
        return tl.full((), 0, tl.int64)
    else:
        return globaltimer()
