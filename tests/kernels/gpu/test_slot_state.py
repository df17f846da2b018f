"""Slot state on the device: admitted, read, advanced, against plain Python."""

import numpy as np
import pytest
import torch

from kernels.gpu import slot_state as fields
from kernels.gpu.decode_split import BLOCK_ID, Split, make_schedule
from kernels.gpu.slot_state import NUM_FIELDS, Admission, admit, pack, packed_size, prefill_inputs
from kernels.gpu.step_rings import FAILED, NONE_LEFT, DecodeInputs, RingLayout, advance, decode_inputs

NUM_SLOTS, MAX_BLOCKS, MAX_STOPS, BLOCK_SIZE = 6, 40, 5, 16
POISON = -(2**31)
SPLIT = Split(num_programs=20, num_kv_heads=2, max_items=0, min_share=1)


class Slots:
    """Poisoned device tensors and the rings."""

    def __init__(self, device: torch.device, layout: RingLayout | None = None, ring_size: int = 3) -> None:
        self.device = device
        self.layout = layout or RingLayout(max_batch=5, max_appends=3)
        self.state = self.poisoned(NUM_FIELDS.value, NUM_SLOTS)
        self.stop_token_ids = self.poisoned(NUM_SLOTS, MAX_STOPS)
        self.block_tables = self.poisoned(NUM_SLOTS, MAX_BLOCKS)
        self.rows = self.poisoned(self.layout.max_batch)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self.clock = torch.full((1,), -1, dtype=torch.int64, device=device)
        pin = device.type == "cuda"
        self.ring = torch.full((ring_size, self.layout.inputs_size), POISON, dtype=torch.int32, pin_memory=pin)
        self.results = torch.full((ring_size, self.layout.result_size), POISON, dtype=torch.int32, pin_memory=pin)

    def poisoned(self, *size: int) -> torch.Tensor:
        return torch.full(size, POISON, dtype=torch.int32, device=self.device)

    def ints(self, *values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def set(self, field, **by_slot: int) -> None:
        for name, value in by_slot.items():
            self.state[field.value, int(name[1:])] = value

    def get(self, field) -> list[int]:
        return self.state[field.value].tolist()

    def write_entry(self, entry: int, rows: list[int] | None, appends: tuple[tuple[int, int, int], ...] = ()) -> None:
        self.ring[entry, 0], self.ring[entry, 1] = len(appends), rows is not None
        if rows is not None:
            self.ring[entry, self.layout.rows()] = torch.tensor(rows, dtype=torch.int32)
        for column, values in enumerate(zip(*appends, strict=True)):
            self.ring[entry, self.layout.append(column)][: len(values)] = torch.tensor(values, dtype=torch.int32)

    def decode(self, batch: int) -> DecodeInputs:
        return decode_inputs(
            self.ring, self.layout, self.cursor, self.state, self.block_tables, self.rows, self.clock, batch,
            BLOCK_SIZE, SPLIT,
        )  # fmt: skip

    def advance(self, tokens: list[int], slots: list[int], *, decode: bool) -> None:
        logprobs = torch.tensor([-0.5 - index for index in range(len(tokens))], device=self.device)
        advance(
            self.ints(*tokens), logprobs, self.ints(*slots), self.state, self.stop_token_ids, self.cursor, self.clock,
            self.results, self.layout, decode=decode,
        )  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def result(self, entry: int, num_rows: int) -> tuple[list[int], list[int], list[float]]:
        columns = [self.results[entry, self.layout.result(column)][:num_rows] for column in range(3)]
        return columns[0].tolist(), columns[1].tolist(), columns[2].view(torch.float32).tolist()

    def header(self, entry: int) -> list[int]:
        return self.results[entry, :6].view(torch.int64).tolist()


def admission(slot: int, num_blocks: int = 1, stops: tuple[int, ...] = (), **params) -> Admission:
    defaults = {
        "context_len": 0, "max_total": 100, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0,
        "choice_index": 0,
    }  # fmt: skip
    return Admission(
        slot=slot, block_ids=np.arange(num_blocks, dtype=np.int32) + 100 * slot,
        stop_token_ids=np.array(stops, dtype=np.int32), **(defaults | params),
    )  # fmt: skip


def bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def test_admitted_sequences_fill_their_slots_and_no_others(device):
    slots = Slots(device)
    sequences = [
        admission(
            4, MAX_BLOCKS, (7, 8, 9, 10, 11), context_len=33, max_total=600, temperature=0.7, top_k=2**32 - 1,
            top_p=0.25, min_p=0.125, seed=2**64 - 2**32 + 5, choice_index=3,
        ),
        admission(0, 0),
        admission(5, 3, (1,), seed=1),
    ]  # fmt: skip
    staging = np.full(packed_size(sequences) + 3, POISON, dtype=np.int32)
    assert pack(sequences, staging) == packed_size(sequences)
    assert (staging[-3:] == POISON).all()
    admit(torch.from_numpy(staging).to(device), 3, slots.state, slots.stop_token_ids, slots.block_tables)

    assert slots.state[:, 4].tolist() == [
        0, 33, 600, 0, bits(0.7), 2**31 - 1, bits(0.25), bits(0.125), 5, -1, 3, 5,
    ]  # fmt: skip
    assert slots.get(fields.SEED_LOW) == [0, POISON, POISON, POISON, 5, 1]
    assert slots.get(fields.NUM_STOPS) == [0, POISON, POISON, POISON, 5, 1]
    assert slots.stop_token_ids[4].tolist() == [7, 8, 9, 10, 11]
    assert slots.stop_token_ids[5].tolist() == [1] + [POISON] * 4
    assert slots.block_tables[4].tolist() == list(range(400, 400 + MAX_BLOCKS))
    assert slots.block_tables[5].tolist() == [500, 501, 502] + [POISON] * (MAX_BLOCKS - 3)
    for untouched in (slots.state[:, 1:4], slots.stop_token_ids[:4], slots.block_tables[:4]):
        assert (untouched == POISON).all()


def test_nobody_is_admitted(device):
    slots = Slots(device)
    admit(slots.ints(), 0, slots.state, slots.stop_token_ids, slots.block_tables)
    assert (slots.state == POISON).all()


def test_prefill_inputs_of_ragged_chunks(device):
    slots = Slots(device)
    for slot in (2, 3, 5):
        slots.block_tables[slot] = torch.randperm(1000)[:MAX_BLOCKS].int()
    chunks = [(5, 17, 300, 0), (2, 0, 1, 300), (POISON, 0, 0, POISON), (3, 31, 2, 302)]  # padding; row 301 is nobody's
    n = 306
    positions, slot_mapping = slots.poisoned(n), slots.poisoned(n)
    columns = torch.zeros(4, 9, dtype=torch.int32, device=device)[:, :4]  # a view
    columns.copy_(torch.tensor(chunks).T)
    prefill_inputs(
        columns, slots.state, slots.block_tables, slots.clock, positions, slot_mapping, BLOCK_SIZE, max_count=300
    )

    expected_positions, expected_mapping = [POISON] * n, [POISON] * n
    for slot, start, count, first_row in chunks:
        for offset in range(count):
            place = start + offset
            expected_positions[first_row + offset] = place
            block = int(slots.block_tables[slot, place // BLOCK_SIZE])
            expected_mapping[first_row + offset] = block * BLOCK_SIZE + place % BLOCK_SIZE
    assert positions.tolist() == expected_positions
    assert slot_mapping.tolist() == expected_mapping
    assert slots.get(fields.CONTEXT_LEN) == [POISON, POISON, 1, 33, POISON, 317]
    assert slots.clock.item() >= 0


def test_decode_inputs_of_live_done_and_padding_rows(device):
    slots = Slots(device)
    slots.set(fields.DONE, s0=0, s1=1, s2=0, s4=0)
    slots.set(fields.CONTEXT_LEN, s0=31, s2=32, s4=65)
    slots.set(fields.LAST_TOKEN, s0=70, s2=72, s4=74)
    slots.block_tables[0, 1], slots.block_tables[2, 2] = 11, 12
    # Slot 4's block arrives with this step. The entry's number is the cursor modulo the ring's size.
    slots.cursor.fill_(3 * 2**32 + 1)
    slots.write_entry(1, [2, 1, -1, 0, 4], ((4, 4, 1_000_000), (4, 5, 9)))
    inputs = slots.decode(5)
    assert inputs.input_ids.tolist() == [72, 0, 0, 70, 74]
    assert inputs.positions.tolist() == [32, 0, 0, 31, 65]
    assert inputs.slot_mapping.tolist() == [12 * 16, -1, -1, 11 * 16 + 15, 16_000_001]
    assert inputs.context_lens.tolist() == [33, 0, 0, 32, 66]
    assert inputs.row_slots.tolist() == [2, -1, -1, 0, 4]
    schedule = make_schedule(inputs.context_lens, inputs.row_slots, slots.block_tables, BLOCK_SIZE, SPLIT)
    assert inputs.schedule[:, :-1].tolist() == schedule[:, :-1].tolist()  # nobody follows the last program
    assert inputs.schedule[BLOCK_ID.value, -1].item() == 1_000_000
    assert slots.block_tables[4, 3:7].tolist() == [POISON, 1_000_000, 9, POISON]
    assert slots.cursor.item() == 3 * 2**32 + 1
    assert slots.clock.item() >= 0


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rows_stay_until_an_entry_changes_them(batch, device):
    slots = Slots(device)
    slots.set(fields.DONE, s0=0, s1=0, s2=0)
    slots.set(fields.CONTEXT_LEN, s0=0, s1=1, s2=2)
    slots.set(fields.LAST_TOKEN, s0=70, s1=71, s2=72)
    slots.block_tables[:3, 0] = 1
    slots.write_entry(0, [1, 0, 2, -1, -1])
    slots.decode(batch)
    assert slots.rows.tolist() == [1, 0, 2, -1, -1]  # all of them: another batch size may come next
    slots.cursor.fill_(1)
    slots.write_entry(1, None)
    assert slots.decode(batch).row_slots.tolist() == [1, 0, 2][:batch]
    slots.cursor.fill_(2)
    slots.write_entry(2, [2, -1, -1, -1, -1])
    assert slots.decode(batch).row_slots.tolist() == [2, -1, -1][:batch]


@pytest.mark.parametrize("failure", [FAILED.value, NONE_LEFT.value])
@pytest.mark.parametrize("decode", [True, False])
def test_advance_ends_sequences_for_the_right_reason(decode, failure, device):
    slots = Slots(device)
    length = 9  # after the step
    for slot in range(NUM_SLOTS):
        name = f"s{slot}"
        slots.set(fields.CONTEXT_LEN, **{name: length - decode})
        slots.set(fields.MAX_TOTAL, **{name: length + 2})
        slots.set(fields.DONE, **{name: 0})
        slots.set(fields.NUM_STOPS, **{name: 2})
    slots.stop_token_ids[:, 0], slots.stop_token_ids[:, 1], slots.stop_token_ids[:, 2] = 50, 51, 52
    slots.set(fields.MAX_TOTAL, s1=length + 1, s2=length + 1, s5=length + 1)
    slots.set(fields.NUM_STOPS, s4=0)

    #        goes on, length, stop before length, failed, no stop of its own
    slots.advance([52, 60, 51, failure, 50], [0, 1, 2, 3, 4], decode=decode)
    token_ids, reasons, logprobs = slots.result(0, 5)
    assert token_ids == [52, 60, 51, failure, 50]
    assert reasons == [0, 2, 1, 3, 0]
    assert logprobs == [-0.5, -1.5, -2.5, -3.5, -4.5]
    assert slots.get(fields.DONE) == [0, 1, 1, 1, 0, 0]
    assert slots.get(fields.LAST_TOKEN) == [52, 60, 51, POISON, 50, POISON]
    assert slots.get(fields.CONTEXT_LEN) == [length] * 5 + [length - decode]


def test_advance_skips_rows_without_a_slot_and_counts_steps(device):
    slots = Slots(device, ring_size=2)
    slots.set(fields.CONTEXT_LEN, s3=1)
    slots.set(fields.MAX_TOTAL, s3=99)
    slots.set(fields.NUM_STOPS, s3=0)
    slots.clock.fill_(77)
    for step, token in enumerate((5, 6, 2**31 - 1)):
        slots.advance([-1, token, -1], [-1, 3, -1], decode=True)
        entry = step % 2
        assert slots.result(entry, 3)[:2] == ([-1, token, -1], [-1, 0, -1])
        assert slots.result(entry, 5)[0][3:] == [POISON] * 2
        number, begin, end = slots.header(entry)
        assert (number, begin) == (step + 1, 77)
        assert end >= 0
        assert slots.cursor.item() == step + 1
    assert slots.get(fields.CONTEXT_LEN) == [POISON] * 3 + [4] + [POISON] * 2
    assert slots.header(1)[0] == 2  # the older entry is untouched


def test_a_sequence_decodes_to_its_end(device):
    slots = Slots(device)
    staging = np.zeros(packed_size([admission(1)]), np.int32)
    pack([admission(1, max_total=4)], staging)
    admit(torch.from_numpy(staging).to(device), 1, slots.state, slots.stop_token_ids, slots.block_tables)
    chunk = torch.tensor([[1], [0], [2], [0]], dtype=torch.int32, device=device)
    rows = slots.poisoned(2, 2)
    prefill_inputs(chunk, slots.state, slots.block_tables, slots.clock, rows[0], rows[1], BLOCK_SIZE, max_count=2)
    slots.advance([30], [1], decode=False)
    seen = []
    for step in range(1, 4):
        slots.write_entry(step % 3, [1, -1, -1, -1, -1] if step == 1 else None)
        inputs = slots.decode(2)
        seen.append((inputs.input_ids[0].item(), inputs.context_lens[0].item(), inputs.row_slots[0].item()))
        slots.advance([30 + step, -1], inputs.row_slots.tolist(), decode=True)
    assert seen == [(30, 3, 1), (0, 0, -1), (0, 0, -1)]  # 4 tokens: 2 of the prompt, then 30 and 31
    assert [slots.result(step % 3, 1)[1][0] for step in (1, 2, 3)] == [2, -1, -1]
    assert slots.get(fields.LAST_TOKEN)[1] == 31


@pytest.mark.parametrize("max_batch", [1, 2, 7, 256])
def test_entries_hold_aligned_times_and_disjoint_columns(max_batch):
    layout = RingLayout(max_batch, max_appends=3)
    assert layout.result_size % 2 == 0  # int64 in every entry of the ring
    for columns, size in (
        ([layout.rows(), *(layout.append(column) for column in range(3))], layout.inputs_size),
        ([layout.result(column) for column in range(3)], layout.result_size),
    ):
        places = [place for column in columns for place in range(column.start, column.stop)]
        assert len(set(places)) == len(places)
        assert max(places) < size
