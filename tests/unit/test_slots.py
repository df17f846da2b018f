"""Slots, ledger and step inputs against sequences kept as plain Python lists."""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.plan import InvalidPlan, Limits, NewSequence, Plan, Sampling
from executor_service.runner.ledger import Ledger
from executor_service.runner.slots import SlotState
from executor_service.runner.step_inputs import decode_inputs, prefill_inputs

LIMITS = Limits(num_slots=5, num_blocks=40, block_size=4, vocab_size=50, max_model_len=30, max_tokens_per_step=64)
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, choice_index=0)
STOP = 49


def column(values: Sequence[int]) -> np.ndarray:
    array = np.array(values, dtype=np.int32)
    array.flags.writeable = False  # as in a decoded plan
    return array


def plan(new: Sequence[NewSequence] = (), iterations: int = 0, **columns: Sequence[int]) -> Plan:
    names = [field.name for field in dataclasses.fields(Plan) if field.name.split("_")[-1] not in ("id", "iterations")]
    names.remove("new_sequences")
    return Plan(
        step_id=1, new_sequences=list(new), iterations=iterations,
        **{name: column(columns.get(name, ())) for name in names},
    )  # fmt: skip


def sequence(slot: int, tokens: Sequence[int], blocks: Sequence[int], **changes: Any) -> NewSequence:
    fields: dict[str, Any] = {
        "slot": slot, "token_ids": column(tokens), "num_prompt_tokens": len(tokens), "num_cached_tokens": 0,
        "block_ids": column(blocks), "sampling": GREEDY, "stop_token_ids": column([STOP]), "max_total_tokens": 30,
    }  # fmt: skip
    return NewSequence(**(fields | changes))


@dataclasses.dataclass
class Row:
    """What a sequence is, without tensors."""

    tokens: list[int]
    blocks: list[int]
    num_known: int
    computed: int
    max_total: int
    decoding: bool = False
    done: bool = False


class Model:
    """Draws valid plans, and knows what each must do."""

    def __init__(self, choices: random.Random) -> None:
        self.choices = choices
        self.rows: dict[int, Row] = {}

    def draw(self) -> Plan:
        choices, rows = self.choices, self.rows
        releases = [slot for slot in rows if choices.random() < (0.5 if rows[slot].done else 0.05)]
        for slot in releases:
            del rows[slot]
        new = [self.admit(slot) for slot in range(LIMITS.num_slots) if slot not in rows and choices.random() < 0.5]
        chunks = [
            (slot, row.computed, choices.randint(1, row.num_known - row.computed))
            for slot, row in rows.items() if row.computed < row.num_known and choices.random() < 0.7
        ]  # fmt: skip
        ready = [slot for slot, row in rows.items() if row.computed >= row.num_known]
        joins = [slot for slot in ready if not rows[slot].decoding and choices.random() < 0.7]
        leaves = [slot for slot in ready if rows[slot].decoding and choices.random() < 0.1]
        iterations = choices.choice([0, 1, 1] if chunks else [0, 1, 3])
        for slot in (*joins, *leaves):
            rows[slot].decoding = slot in joins
        appends = []
        for slot, row in rows.items():
            missing = -(-min(len(row.tokens) - 1 + iterations, row.max_total - 1) // 4) - len(row.blocks)
            for _ in range(missing if row.decoding else 0):
                row.blocks.append(choices.randrange(LIMITS.num_blocks))
                appends.append((slot, row.blocks[-1]))
        if choices.random() < 0.5:
            appends = interleaved(appends)
        return plan(
            new, iterations, release_slots=releases,
            append_slots=[slot for slot, _ in appends], append_blocks=[block for _, block in appends],
            prefill_slots=[slot for slot, _, _ in chunks], prefill_starts=[start for _, start, _ in chunks],
            prefill_counts=[count for _, _, count in chunks],
            prefill_samples=[start + count == rows[slot].num_known for slot, start, count in chunks],
            join_slots=joins, leave_slots=leaves,
        )  # fmt: skip

    def admit(self, slot: int) -> NewSequence:
        choices = self.choices
        tokens = [choices.randrange(STOP) for _ in range(choices.randint(1, 20))]
        blocks = [choices.randrange(LIMITS.num_blocks) for _ in range(-(-len(tokens) // 4))]
        cached = choices.randrange(len(tokens))
        max_total = choices.randint(len(tokens) + 1, LIMITS.max_model_len)
        self.rows[slot] = Row(list(tokens), list(blocks), len(tokens), cached, max_total)
        return sequence(slot, tokens, blocks, num_cached_tokens=cached, max_total_tokens=max_total)


def interleaved(appends: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Other slots in between, the order within each slot kept."""
    ranks = [[slot for slot, _ in appends[:index]].count(slot) for index, (slot, _) in enumerate(appends)]
    return [appends[index] for index in sorted(range(len(appends)), key=ranks.__getitem__)]


class Device:
    """Runs plans up to the inputs, and samples random tokens."""

    def __init__(self) -> None:
        self.ledger = Ledger.empty(LIMITS)
        self.slots = SlotState(LIMITS, self.ledger.max_blocks_per_sequence, torch.device("cpu"))

    def apply(self, plan: Plan) -> None:
        self.ledger = self.ledger.after(plan)
        self.slots.apply(plan, self.ledger.append_columns(plan))


def sample(model: Model, device: Device, slots: list[int]) -> None:
    tokens = [model.choices.choice([STOP, *range(10)]) for _ in slots]
    reasons = device.slots.sampled(torch.tensor(slots, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64))
    for slot, token, reason in zip(slots, tokens, reasons.tolist(), strict=True):
        row = model.rows[slot]
        row.tokens.append(token)
        row.done = token == STOP or len(row.tokens) == row.max_total
        assert reason == (1 if token == STOP else 2 if row.done else 0)
    device.ledger.end(np.array([slot for slot in slots if model.rows[slot].done], dtype=np.int32))


def check_prefill(plan: Plan, model: Model, device: Device) -> None:
    inputs = prefill_inputs(plan, device.slots)
    chunks = list(
        zip(plan.prefill_slots.tolist(), plan.prefill_starts.tolist(), plan.prefill_counts.tolist(), strict=True)
    )
    flat = [(slot, position) for slot, start, count in chunks for position in range(start, start + count)]
    assert inputs.input_ids.tolist() == [model.rows[slot].tokens[position] for slot, position in flat]
    assert inputs.metadata.positions.tolist() == [position for _, position in flat]
    assert inputs.metadata.context_lens == tuple(start + count for _, start, count in chunks)
    starts = inputs.metadata.query_starts
    assert [end - start for start, end in itertools.pairwise(starts)] == [count for _, _, count in chunks]
    for table, (slot, _, _) in zip(inputs.metadata.block_tables, chunks, strict=True):
        assert table[: len(model.rows[slot].blocks)].tolist() == model.rows[slot].blocks
    sampling = [
        (slot, start + count - 1) for slot, start, count in chunks if start + count == model.rows[slot].num_known
    ]
    assert inputs.sampling_slots.tolist() == [slot for slot, _ in sampling]
    assert [flat[row] for row in inputs.sampling_rows.tolist()] == sampling
    device.slots.prefilled(inputs.slots, inputs.ends)
    for slot, start, count in chunks:
        model.rows[slot].computed = start + count
    sample(model, device, [slot for slot, _ in sampling])


def check_decode(model: Model, device: Device) -> None:
    device.slots.refresh_decode_slots()
    slots = device.slots.decode_slots.tolist()
    assert slots == sorted(slot for slot, row in model.rows.items() if row.decoding and not row.done)
    inputs = decode_inputs(device.slots)
    rows = [model.rows[slot] for slot in slots]
    assert inputs.input_ids.tolist() == [row.tokens[-1] for row in rows]
    assert inputs.metadata.positions.tolist() == [len(row.tokens) - 1 for row in rows]
    assert torch.equal(device.slots.decode_sampling.seed, device.slots.sampling.seed[slots])
    for table, row in zip(inputs.metadata.block_tables, rows, strict=True):
        assert table[: len(row.blocks)].tolist() == row.blocks
    device.slots.prefilled(device.slots.decode_slots, inputs.metadata.positions + 1)
    sample(model, device, slots)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_inputs_are_those_of_plain_lists_under_random_plans(seed: int) -> None:
    model, device = Model(random.Random(seed)), Device()
    with torch.inference_mode():
        for _ in range(25):
            plan = model.draw()
            device.apply(plan)
            if len(plan.prefill_slots):
                check_prefill(plan, model, device)
            for _ in range(plan.iterations):
                check_decode(model, device)


def test_a_seed_keeps_all_of_its_64_bits() -> None:
    device = Device()
    sampling = dataclasses.replace(GREEDY, seed=2**64 - 2)
    device.apply(plan([sequence(1, [1], [0], sampling=sampling)]))
    assert device.slots.sampling.seed[1].item() == -2


def test_more_stop_ids_than_before_widen_the_table_for_all() -> None:
    device = Device()
    many = column(range(20, 29))
    device.apply(plan([sequence(0, [1], [0]), sequence(1, [1], [1], stop_token_ids=many)]))
    device.apply(plan([sequence(2, [1], [2], stop_token_ids=column([]))]))
    reasons = device.slots.sampled(torch.tensor([0, 1, 2]), torch.tensor([28, 28, 28]))
    assert reasons.tolist() == [0, 1, 0]
    assert device.slots.sampled(torch.tensor([0]), torch.tensor([STOP])).tolist() == [1]


def test_a_slot_forgets_the_stop_ids_of_the_sequence_before() -> None:
    device = Device()
    device.apply(plan([sequence(0, [1], [0], stop_token_ids=column([5, 6]))]))
    device.apply(plan([sequence(0, [1], [0], stop_token_ids=column([7]))], release_slots=[0]))
    assert [device.slots.sampled(torch.tensor([0]), torch.tensor([token])).item() for token in (5, 6, 7)] == [0, 0, 1]


PREFILLED = plan(
    [sequence(0, [1, 2, 3], [5]), sequence(1, [1, 2, 3, 4, 5, 6], [6, 7])],
    prefill_slots=[0, 1], prefill_starts=[0, 0], prefill_counts=[3, 2], prefill_samples=[1, 0],
)  # fmt: skip


def chunk(slot: int, start: int, count: int, samples: bool) -> dict[str, Any]:
    return {"prefill_slots": [slot], "prefill_starts": [start], "prefill_counts": [count], "prefill_samples": [samples]}


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        ("slot 0 is occupied", plan([sequence(0, [1], [0])])),
        ("slot 3 is occupied", plan([sequence(3, [1], [0]), sequence(3, [1], [0])])),
        ("more than a sequence can use", plan([sequence(3, [1], range(9))])),
        ("release of an empty slot: slot 3", plan(release_slots=[3])),
        ("release_slots: a slot stands twice", plan(release_slots=[1, 1])),
        ("append to an empty slot: slot 4", plan(append_slots=[0, 4], append_blocks=[1, 2])),
        ("beyond the longest block table: slot 0", plan(append_slots=[0] * 8, append_blocks=range(8))),
        ("first position without KV entries: slot 1", plan(**chunk(1, 3, 1, False))),
        ("first position without KV entries: slot 1", plan(**chunk(1, 0, 2, False))),
        ("beyond the known tokens: slot 1", plan(**chunk(1, 2, 5, True))),
        ("beyond the known tokens: slot 0", plan(**chunk(0, 3, 1, True))),
        ("beyond the known tokens: slot 3", plan(**chunk(3, 0, 1, True))),
        ("empty prefill chunk: slot 1", plan(**chunk(1, 2, 0, False))),
        ("samples elsewhere", plan(**chunk(1, 2, 4, False))),
        ("samples elsewhere", plan(**chunk(1, 2, 1, True))),
        ("prefill_slots: a slot stands twice", plan(**{name: v * 2 for name, v in chunk(1, 2, 1, False).items()})),
        ("join of an empty slot: slot 3", plan(join_slots=[3])),
        ("join before the prefill has ended: slot 1", plan(join_slots=[0, 1])),
        ("join in the plan that ends the prefill: slot 1", plan(**chunk(1, 2, 4, True), join_slots=[1])),
        ("join_slots: a slot stands twice", plan(join_slots=[0, 0])),
        ("leave of a slot that does not decode: slot 0", plan(leave_slots=[0])),
        ("no block for a position: slot 0", plan(join_slots=[0], iterations=2)),
        ("mask_slots: a slot stands twice", plan(**chunk(1, 2, 4, True), mask_slots=[1, 1])),
        ("mask of a slot that does not sample: slot 1", plan(**chunk(1, 2, 1, False), mask_slots=[1])),
        ("mask of a slot that does not sample: slot 0", plan(join_slots=[0], mask_slots=[0])),
    ],
)
def test_a_plan_that_does_not_fit_the_slots_is_refused_and_changes_nothing(message: str, bad: Plan) -> None:
    before = Ledger.empty(LIMITS).after(PREFILLED)
    copies = [np.copy(value) for value in dataclasses.astuple(before)[1:]]
    with pytest.raises(InvalidPlan, match=message):
        before.after(bad)
    assert all((old == new).all() for old, new in zip(copies, dataclasses.astuple(before)[1:], strict=True))


def test_a_decoding_slot_may_not_join_again() -> None:
    ledger = Ledger.empty(LIMITS).after(PREFILLED).after(plan(join_slots=[0]))
    with pytest.raises(InvalidPlan, match="join of a decoding slot: slot 0"):
        ledger.after(plan(join_slots=[0]))


def test_positions_past_the_length_limit_need_no_block() -> None:
    full = sequence(0, [1, 2, 3], [5], max_total_tokens=5)
    chunks = chunk(0, 0, 3, True)
    Ledger.empty(LIMITS).after(plan([full], **chunks)).after(plan(join_slots=[0], iterations=8))
