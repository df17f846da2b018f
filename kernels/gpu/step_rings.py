"""The first and the last kernel of a step, which read and write rings of pinned host memory.

The host fills an entry of the inputs ring before it launches a decode step and must leave it alone until that step's
result is there. `cursor` ([1] int64, on the device) counts the steps so far, prefill phases too: step number `cursor`
uses entry `cursor % ring_size` of both rings. A prefill phase reads no inputs entry.
state, stop_token_ids, block_tables: see `kernels.gpu.slot_state`.
"""

# pyright: reportCallIssue=false, reportReturnType=false

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.decode_split import Split, empty_schedule, tile_size, write_schedule
from kernels.gpu.interpreted import INTERPRETED
from kernels.gpu.slot_state import CONTEXT_LEN, DONE, LAST_TOKEN, MAX_TOTAL, NUM_STOPS, device_time

FAILED = tl.constexpr(-2)  # a sampled token: there is none, since a logit was not finite
NONE_LEFT = tl.constexpr(-3)  # the same, since every token was out of the question
REASON_CONTINUES, REASON_FAILED = 0, 3  # two of the finish reasons: see `advance`
_RESULT_HEADER = tl.constexpr(8)  # int32


@dataclasses.dataclass(frozen=True)
class RingLayout:
    """Where things stand in the entries of both rings, in int32."""

    max_batch: int  # rows
    max_appends: int

    @property
    def inputs_size(self) -> int:
        """An inputs entry: number of appended blocks, whether the rows changed (0 or 1), rows ([max_batch] slots, -1 =
        padding), then slots, table columns and block ids of the appended blocks ([max_appends] each)."""
        return 2 + self.max_batch + 3 * self.max_appends

    @property
    def result_size(self) -> int:
        """A result entry: int64 number of the step, counted from 1 and written last, int64 begin and end in ns of the
        device's clock, 2 spare; then token ids, finish reasons and float32 logprobs ([max_batch] each)."""
        return _RESULT_HEADER.value + 3 * self.max_batch + self.max_batch % 2

    def rows(self) -> slice:
        """Of an inputs entry."""
        return slice(2, 2 + self.max_batch)

    def append(self, column: int) -> slice:
        """Of an inputs entry; column: 0 slots, 1 table columns, 2 block ids."""
        start = 2 + self.max_batch + column * self.max_appends
        return slice(start, start + self.max_appends)

    def result(self, column: int) -> slice:
        """Of a result entry; column: 0 token ids, 1 finish reasons, 2 logprobs."""
        start = _RESULT_HEADER.value + column * self.max_batch
        return slice(start, start + self.max_batch)


@dataclasses.dataclass(frozen=True)
class DecodeInputs:
    """What a decode step computes from; rows of padding and of done sequences are dead. All int32 on the device."""

    input_ids: Tensor  # [batch], dead: 0
    positions: Tensor  # [batch], dead: 0
    slot_mapping: Tensor  # [batch], dead: -1
    context_lens: Tensor  # [batch], the new token included, dead: 0
    row_slots: Tensor  # [batch], dead: -1
    schedule: Tensor  # [NUM_FIELDS, num_programs], what programs of decode attention do, see `decode_split`


def decode_inputs(
    ring: Tensor, layout: RingLayout, cursor: Tensor, state: Tensor, block_tables: Tensor, rows: Tensor, clock: Tensor,
    batch: int, block_size: int, split: Split,
) -> DecodeInputs:  # fmt: skip
    """Apply the step's entry of the inputs ring, then look up what the first `batch` rows decode.

    ring: [ring_size, layout.inputs_size] int32, pinned host memory. rows: [max_batch] int32, which slot each row of
    the decode batch is, -1 = padding; replaced where the entry says so. clock: [1] int64, set to the device's time.
    split: what the schedule is made for.
    """
    input_ids, positions, slot_mapping, context_lens, row_slots = (
        torch.empty(batch, dtype=torch.int32, device=state.device) for _ in range(5)
    )
    schedule, starts = empty_schedule(split, batch, state.device)
    _decode_inputs_kernel[(1,)](
        ring, ring.stride(0), cursor, state, state.stride(0), block_tables, block_tables.stride(0), rows, clock,
        input_ids, positions, slot_mapping, context_lens, row_slots, schedule, starts, batch,
        min(split.max_items, split.num_programs), split.min_share,
        RING_SIZE=ring.shape[0], MAX_BATCH=layout.max_batch, MAX_APPENDS=layout.max_appends,
        NUM_PROGRAMS=split.num_programs, NUM_KV_HEADS=split.num_kv_heads, BLOCK=triton.next_power_of_2(batch),
        TILE=tile_size(block_size), BLOCK_SIZE=block_size,
        num_warps=_num_warps(max(layout.max_batch, layout.max_appends, split.num_programs)),
    )  # fmt: skip
    return DecodeInputs(input_ids, positions, slot_mapping, context_lens, row_slots, schedule)


def _num_warps(num_rows: int) -> int:
    return min(max(triton.next_power_of_2(num_rows) // 32, 1), 8)


@triton.jit(do_not_specialize=["num_rows", "max_items", "min_share"])
def _decode_inputs_kernel(
    ring, ring_stride, cursor, state, state_stride, block_tables, tables_stride, rows, clock,
    input_ids, positions, slot_mapping, context_lens, row_slots, schedule, starts, num_rows,
    max_items, min_share,
    RING_SIZE: tl.constexpr, MAX_BATCH: tl.constexpr, MAX_APPENDS: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    tl.store(clock, device_time())
    entry = ring + tl.load(cursor) % RING_SIZE * ring_stride
    num_appends = tl.load(entry)
    rows_changed = tl.load(entry + 1)
    if num_appends > 0:
        index = tl.arange(0, triton.next_power_of_2(MAX_APPENDS))
        appends, is_append = entry + 2 + MAX_BATCH + index, index < tl.minimum(num_appends, MAX_APPENDS)
        slots = tl.load(appends, mask=is_append).to(tl.int64)
        columns = tl.load(appends + MAX_APPENDS, mask=is_append)
        blocks = tl.load(appends + 2 * MAX_APPENDS, mask=is_append)
        tl.store(block_tables + slots * tables_stride + columns, blocks, mask=is_append)
    if rows_changed > 0:
        index = tl.arange(0, triton.next_power_of_2(MAX_BATCH))
        changed = tl.load(entry + 2 + index, mask=index < MAX_BATCH)
        tl.store(rows + index, changed, mask=index < MAX_BATCH)
    tl.debug_barrier()  # makes the stores above visible to all threads

    index = tl.arange(0, BLOCK)
    is_row = index < num_rows
    slots = tl.load(rows + index, mask=is_row, other=-1)
    done = tl.load(state + DONE * state_stride + slots, mask=slots >= 0, other=1)
    live = done == 0
    place = tl.load(state + CONTEXT_LEN * state_stride + slots, mask=live, other=0)
    token = tl.load(state + LAST_TOKEN * state_stride + slots, mask=live, other=0)
    block = tl.load(block_tables + slots.to(tl.int64) * tables_stride + place // BLOCK_SIZE, mask=live, other=0)
    length = tl.where(live, place + 1, 0)
    tl.store(input_ids + index, token, mask=is_row)
    tl.store(positions + index, place, mask=is_row)
    tl.store(slot_mapping + index, tl.where(live, block * BLOCK_SIZE + place % BLOCK_SIZE, -1), mask=is_row)
    tl.store(context_lens + index, length, mask=is_row)
    tl.store(row_slots + index, tl.where(live, slots, -1), mask=is_row)
    write_schedule(
        schedule, starts, context_lens, row_slots, num_rows, length, block_tables, tables_stride, max_items, min_share,
        NUM_PROGRAMS, NUM_KV_HEADS, TILE, BLOCK_SIZE, BLOCK,
    )  # fmt: skip


def advance(
    token_ids: Tensor, logprobs: Tensor, row_slots: Tensor, state: Tensor, stop_token_ids: Tensor, cursor: Tensor,
    clock: Tensor, results: Tensor, layout: RingLayout, *, decode: bool,
) -> None:  # fmt: skip
    """Append the sampled tokens to their slots, publish them and count the step: its last kernel.

    token_ids: [n] int32, n up to max_batch, FAILED, NONE_LEFT or -1 for nothing; logprobs: [n] float32; row_slots: [n]
    int32, distinct, -1 = the row sampled nothing. decode: CONTEXT_LEN grows by one, which prefill_inputs did otherwise.
    clock: [1] int64, when the step began. results: [ring_size, layout.result_size] int32, pinned host memory.
    Finish reasons: -1 sampled nothing, 0 goes on, 1 stop token, 2 length, 3 failed; above 0 the slot is done.
    """
    num_rows = token_ids.shape[0]
    most_rows = num_rows if decode else layout.max_batch  # prefills of every size share what was compiled at the start
    _advance_kernel[(1,)](
        token_ids, logprobs, row_slots, num_rows, state, state.stride(0), stop_token_ids, stop_token_ids.stride(0),
        stop_token_ids.shape[1], cursor, clock, results, results.stride(0), RING_SIZE=results.shape[0],
        MAX_BATCH=layout.max_batch, BLOCK=triton.next_power_of_2(most_rows), DECODE=decode,
        num_warps=_num_warps(most_rows),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _advance_kernel(
    token_ids, logprobs, row_slots, num_rows, state, state_stride, stop_token_ids, stops_stride, max_stops, cursor,
    clock, results, results_stride, RING_SIZE: tl.constexpr, MAX_BATCH: tl.constexpr, BLOCK: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, BLOCK)
    is_row = index < num_rows
    slots = tl.load(row_slots + index, mask=is_row, other=-1)
    tokens = tl.load(token_ids + index, mask=is_row, other=-1)
    row_logprobs = tl.load(logprobs + index, mask=is_row, other=0.0)
    step = tl.load(cursor)
    live = slots >= 0
    sampled, failed = live & (tokens >= 0), live & (tokens <= FAILED)

    context_len = tl.load(state + CONTEXT_LEN * state_stride + slots, mask=live, other=0)
    if DECODE:
        context_len += 1
        tl.store(state + CONTEXT_LEN * state_stride + slots, context_len, mask=live)
    max_total = tl.load(state + MAX_TOTAL * state_stride + slots, mask=live, other=0)
    num_stops = tl.minimum(tl.load(state + NUM_STOPS * state_stride + slots, mask=sampled, other=0), max_stops)
    stops = slots < -1  # none
    for column in range(0, tl.max(num_stops)):
        stop = tl.load(stop_token_ids + slots.to(tl.int64) * stops_stride + column, mask=column < num_stops, other=-1)
        stops = stops | (sampled & (stop == tokens))
    reasons = tl.where(sampled, 0, -1)
    reasons = tl.where(sampled & (context_len + 1 >= max_total), 2, reasons)
    reasons = tl.where(stops, 1, reasons)
    reasons = tl.where(failed, 3, reasons)
    tl.store(state + LAST_TOKEN * state_stride + slots, tokens, mask=sampled)
    tl.store(state + DONE * state_stride + slots, 1, mask=reasons > 0)

    entry = results + step % RING_SIZE * results_stride
    columns = entry + _RESULT_HEADER + index
    tl.store(columns, tokens, mask=is_row)
    tl.store(columns + MAX_BATCH, reasons, mask=is_row)
    tl.store(columns + 2 * MAX_BATCH, row_logprobs.to(tl.int32, bitcast=True), mask=is_row)
    header = entry.to(tl.pointer_type(tl.int64), bitcast=True)
    tl.store(header + 1, tl.load(clock))
    tl.store(header + 2, device_time())
    tl.debug_barrier()  # the other threads' stores come before the step's number, as its reader sees them
    _publish(header, step + 1)
    tl.store(cursor, step + 1)


@triton.jit
def _publish(address, value):
    """Store an int64 from one thread, after all that the program stored before, for readers on the host too."""
    if INTERPRETED:
        tl.store(address, value)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first st.release.sys.global.u64 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,l",
            [address.to(tl.int64, bitcast=True), value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
