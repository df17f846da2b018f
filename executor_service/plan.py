"""A step plan as numpy columns, checked on the way in.

Every index that a plan carries reaches device memory, so each is checked here, once, and nowhere else.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from protos.duet.executor.v1 import executor_pb2 as pb

Column = NDArray[np.int32]
Mask = NDArray[np.int32]  # [ceil(vocab_size / 32)], bit i % 32 of word i / 32 allows token i
NO_COLUMN: Column = np.empty(0, dtype=np.int32)
MAX_NUM_LOGPROBS = 21  # the token itself and 20 alternatives


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


_FLOATS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
)  # fmt: skip


def _no_column() -> Column:
    return NO_COLUMN


def _no_values() -> NDArray[np.float32]:
    return np.empty(0, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one sequence's tokens are chosen: SamplingParams in executor.proto says what each value means."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int  # unsigned 64 bits
    choice_index: int
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias_token_ids: Column = dataclasses.field(default_factory=_no_column)  # [num_biased], distinct
    bias_values: NDArray[np.float32] = dataclasses.field(default_factory=_no_values)  # [num_biased]
    allowed_token_ids: Column = dataclasses.field(default_factory=_no_column)  # [any]; empty: all are allowed
    banned_token_ids: Column = dataclasses.field(default_factory=_no_column)  # [any]
    min_total_tokens: int = 0
    end_token_ids: Column = dataclasses.field(default_factory=_no_column)  # [any]
    num_logprobs: int = 0
    num_prompt_logprobs: int = 0

    @property
    def has_penalties(self) -> bool:
        """Whether it matters which tokens the sequence holds."""
        return bool(self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty)

    @property
    def changes_logits(self) -> bool:
        """Whether the model's logits are changed before temperature applies; min_total_tokens until it is reached."""
        columns = self.bias_token_ids, self.allowed_token_ids, self.banned_token_ids
        return self.has_penalties or self.min_total_tokens > 0 or any(len(column) > 0 for column in columns)


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
    mask_slots: Column = dataclasses.field(default_factory=_no_column)  # [num_masked]
    masks: NDArray[np.int32] = dataclasses.field(default_factory=_no_column)  # [num_masked, ceil(vocab_size / 32)]


def decode_plan(message: pb.StepPlan, limits: Limits) -> Plan:
    """Turn the message into columns.

    Raises: InvalidPlan, where a column is no int32 array, sister columns differ in length, an index is out of range, a
    number is not finite, or no token is left to sample from.
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
            ("mask_slots", limits.num_slots),
        )
    }
    _check_equal_lengths(columns, "append_slots", "append_blocks")
    _check_equal_lengths(columns, "prefill_slots", "prefill_starts", "prefill_counts", "prefill_samples")
    if len(columns["prefill_slots"]) and message.iterations > 1:
        raise InvalidPlan("iterations above 1 beside prefill chunks")
    if len(columns["mask_slots"]) and message.iterations > 1:
        raise InvalidPlan("iterations above 1 beside masks")
    if message.iterations > limits.max_model_len:
        raise InvalidPlan(f"iterations {message.iterations} are more than the tokens of any sequence")
    if int(columns["prefill_counts"].sum()) > limits.max_tokens_per_step:
        raise InvalidPlan("prefill_counts exceed max_tokens_per_step")
    return Plan(
        step_id=message.step_id,
        new_sequences=[_new_sequence(sequence, limits) for sequence in message.new_sequences],
        iterations=message.iterations,
        masks=_masks(message.masks, len(columns["mask_slots"]), limits.vocab_size),
        **columns,
    )


def _masks(data: bytes, num_masks: int, vocab_size: int) -> NDArray[np.int32]:
    """[num_masks, ceil(vocab_size / 32)]; bits of no token mean nothing."""
    num_words = -(-vocab_size // 32)
    if len(data) != 4 * num_masks * num_words:
        raise InvalidPlan(f"masks: {len(data)} bytes for {num_masks} slots of {num_words} words")
    masks = np.frombuffer(data, dtype="<i4").reshape(num_masks, num_words)
    bits_of_last_word = 2 ** ((vocab_size - 1) % 32 + 1) - 1
    allows = masks[:, :-1].any(axis=1) | (masks[:, -1].view(np.uint32) & np.uint32(bits_of_last_word) != 0)
    if not allows.all():
        raise InvalidPlan("masks: no token is allowed")
    return masks


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
    stop_token_ids = _column("stop_token_ids", message.stop_token_ids, limits.vocab_size)
    sampling = _sampling(message.sampling, limits)
    if sampling.num_prompt_logprobs and message.num_cached_tokens:
        raise InvalidPlan(f"slot {message.slot}: num_prompt_logprobs beside cached tokens")
    if not _leaves_a_token(sampling, stop_token_ids, len(token_ids), limits.vocab_size):
        raise InvalidPlan(f"slot {message.slot}: no token is allowed")
    return NewSequence(
        slot=message.slot,
        token_ids=token_ids,
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        block_ids=block_ids,
        sampling=sampling,
        stop_token_ids=stop_token_ids,
        max_total_tokens=message.max_total_tokens,
    )


def _sampling(message: pb.SamplingParams, limits: Limits) -> Sampling:
    for name in _FLOATS:
        if not math.isfinite(getattr(message, name)):
            raise InvalidPlan(f"{name} {getattr(message, name)}")
    if message.repetition_penalty < 0:
        raise InvalidPlan(f"repetition_penalty {message.repetition_penalty}")
    if message.choice_index >= 2**31:
        raise InvalidPlan(f"choice_index {message.choice_index}")
    for name in ("num_logprobs", "num_prompt_logprobs"):
        if getattr(message, name) > min(MAX_NUM_LOGPROBS, limits.vocab_size + 1):
            raise InvalidPlan(f"{name} {getattr(message, name)}")
    columns = {
        name: _column(name, getattr(message, name), limits.vocab_size)
        for name in ("bias_token_ids", "allowed_token_ids", "banned_token_ids", "end_token_ids")
    }
    return Sampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed,
        choice_index=message.choice_index,
        repetition_penalty=message.repetition_penalty or 1.0,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        bias_values=_bias_values(message.bias_values, columns["bias_token_ids"]),
        min_total_tokens=message.min_total_tokens,
        num_logprobs=message.num_logprobs,
        num_prompt_logprobs=message.num_prompt_logprobs,
        **columns,
    )


def _bias_values(data: bytes, token_ids: Column) -> NDArray[np.float32]:
    """One for each of token_ids."""
    if not data and not len(token_ids):
        return _no_values()
    if len(data) != 4 * len(token_ids):
        raise InvalidPlan(f"bias_values: {len(data)} bytes for {len(token_ids)} tokens")
    if len(np.unique(token_ids)) < len(token_ids):
        raise InvalidPlan("bias_token_ids: a token stands twice")
    values = np.frombuffer(data, dtype="<f4")
    if not np.isfinite(values).all():
        raise InvalidPlan("bias_values: a value is not finite")
    return values


def _leaves_a_token(sampling: Sampling, stop_token_ids: Column, num_tokens: int, vocab_size: int) -> bool:
    """Whether the first token to be sampled has a choice; those after it have no less."""
    banned = sampling.banned_token_ids
    if num_tokens < sampling.min_total_tokens:
        banned = np.concatenate((banned, stop_token_ids, sampling.end_token_ids))
    if len(sampling.allowed_token_ids):
        return not np.isin(sampling.allowed_token_ids, banned).all()
    return len(banned) < vocab_size or len(np.unique(banned)) < vocab_size


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
