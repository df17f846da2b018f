"""A step plan as numpy columns, checked on the way in.

Every index that a plan carries reaches device memory, so each is checked here, once, and nowhere else.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from protos.duet.executor.v1 import executor_pb2 as pb

Column = NDArray[np.int32]


class InvalidPlan(Exception):
    """The plan does not fit the protocol or this executor: the core is at fault."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What indices are checked against."""

    num_slots: int
    num_blocks: int
    block_size: int
    vocab_size: int
    max_model_len: int
    max_tokens_per_step: int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one sequence's tokens are chosen: inference.proto says what each value means."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int  # unsigned 64 bits
    choice_index: int


@dataclasses.dataclass(frozen=True)
class NewSequence:
    """A sequence that takes a slot."""

    slot: int
    token_ids: Column  # [num_tokens], prompt first, then what was generated before a preemption
    num_prompt_tokens: int
    num_cached_tokens: int  # leading positions whose KV entries are in block_ids already
    block_ids: Column  # [ceil(num_tokens / block_size)] or more
    sampling: Sampling
    stop_token_ids: Column  # [any]
    max_total_tokens: int  # prompt included


@dataclasses.dataclass(frozen=True)
class Plan:
    """See StepPlan in executor.proto; the fields are applied in this order."""

    step_id: int
    release_slots: Column  # [num_released]
    new_sequences: list[NewSequence]
    append_slots: Column  # [num_appended], a slot may stand more than once
    append_blocks: Column  # [num_appended]
    prefill_slots: Column  # [num_chunks]
    prefill_starts: Column  # [num_chunks]
    prefill_counts: Column  # [num_chunks]
    prefill_samples: Column  # [num_chunks], 0 or 1
    join_slots: Column  # [num_joining]
    leave_slots: Column  # [num_leaving]
    iterations: int  # decode steps of the decode set after the prefill chunks


def decode_plan(message: pb.StepPlan, limits: Limits) -> Plan:
    """Turn the message into columns.

    Raises: InvalidPlan, where a column is no int32 array, sister columns differ in length or an index is out of range.
    """
    columns = {
        name: _column(name, getattr(message, name), bound)
        for name, bound in (
            ("release_slots", limits.num_slots),
            ("append_slots", limits.num_slots),
            ("append_blocks", limits.num_blocks),
            ("prefill_slots", limits.num_slots),
            ("prefill_starts", limits.max_model_len),
            ("prefill_counts", limits.max_tokens_per_step + 1),
            ("prefill_samples", 2),
            ("join_slots", limits.num_slots),
            ("leave_slots", limits.num_slots),
        )
    }
    _check_equal_lengths(columns, "append_slots", "append_blocks")
    _check_equal_lengths(columns, "prefill_slots", "prefill_starts", "prefill_counts", "prefill_samples")
    if len(columns["prefill_slots"]) and message.iterations > 1:
        raise InvalidPlan("iterations above 1 beside prefill chunks")
    if message.iterations > limits.max_model_len:
        raise InvalidPlan(f"iterations {message.iterations} are more than the tokens of any sequence")
    if int(columns["prefill_counts"].sum()) > limits.max_tokens_per_step:
        raise InvalidPlan("prefill_counts exceed max_tokens_per_step")
    return Plan(
        step_id=message.step_id,
        new_sequences=[_new_sequence(sequence, limits) for sequence in message.new_sequences],
        iterations=message.iterations,
        **columns,
    )


def _new_sequence(message: pb.NewSequence, limits: Limits) -> NewSequence:
    token_ids = _column("token_ids", message.token_ids, limits.vocab_size)
    block_ids = _column("block_ids", message.block_ids, limits.num_blocks)
    if message.slot >= limits.num_slots:
        raise InvalidPlan(f"slot {message.slot} of {limits.num_slots}")
    if not 0 < message.num_prompt_tokens <= len(token_ids) or message.num_cached_tokens >= len(token_ids):
        raise InvalidPlan(f"slot {message.slot}: prompt or cached tokens do not fit {len(token_ids)} tokens")
    if len(block_ids) * limits.block_size < len(token_ids):
        raise InvalidPlan(f"slot {message.slot}: {len(block_ids)} blocks for {len(token_ids)} tokens")
    if not len(token_ids) < message.max_total_tokens <= limits.max_model_len:
        raise InvalidPlan(f"slot {message.slot}: max_total_tokens {message.max_total_tokens}")
    sampling = message.sampling
    if sampling.choice_index >= 2**31:
        raise InvalidPlan(f"slot {message.slot}: choice_index {sampling.choice_index}")
    return NewSequence(
        slot=message.slot,
        token_ids=token_ids,
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        block_ids=block_ids,
        sampling=Sampling(
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed, sampling.choice_index
        ),
        stop_token_ids=_column("stop_token_ids", message.stop_token_ids, limits.vocab_size),
        max_total_tokens=message.max_total_tokens,
    )


def _column(name: str, data: bytes, bound: int) -> Column:
    if len(data) % 4:
        raise InvalidPlan(f"{name}: {len(data)} bytes are no int32 column")
    column = np.frombuffer(data, dtype="<i4")
    if len(column) and not (0 <= int(column.min()) and int(column.max()) < bound):
        raise InvalidPlan(f"{name}: a value is not between 0 and {bound - 1}")
    return column


def _check_equal_lengths(columns: dict[str, Column], *names: str) -> None:
    if len({len(columns[name]) for name in names}) > 1:
        raise InvalidPlan(f"{', '.join(names)} differ in length")
