"""A step as the core plans it, what it remembers of it, and what comes back."""

import dataclasses
import itertools
import sys
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.core.request import Request

Column = NDArray[np.int32]

_SWAP = sys.byteorder == "big"


def column(values: Sequence[int]) -> bytes:
    """Integers as a little-endian int32 column of executor.proto."""
    packed = array("i", values)
    if _SWAP:
        packed.byteswap()
    return packed.tobytes()


@dataclasses.dataclass(slots=True)
class Chunk:
    """Known tokens of one request that a plan computes."""

    request: Request
    slot: int
    start: int
    count: int
    samples: bool  # the chunk ends with the last known token


@dataclasses.dataclass(slots=True)
class StepPlan:
    """See StepPlan in executor.proto: same fields, same order."""

    step_id: int
    release_slots: list[int] = dataclasses.field(default_factory=list)
    new_sequences: list[pb.NewSequence] = dataclasses.field(default_factory=list)
    append_slots: list[int] = dataclasses.field(default_factory=list)
    append_blocks: list[int] = dataclasses.field(default_factory=list)
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    join_slots: list[int] = dataclasses.field(default_factory=list)
    leave_slots: list[int] = dataclasses.field(default_factory=list)
    iterations: int = 0
    mask_slots: list[int] = dataclasses.field(default_factory=list)
    masks: list[Column] = dataclasses.field(default_factory=list)  # little-endian, one for each of mask_slots
    timeout_ms: int = 0
    digests: set[bytes] = dataclasses.field(default_factory=set)  # of the prefixes whose blocks the chunks complete

    def encode(self, epoch: int) -> pb.StepPlan:
        """The message for the executor."""
        return pb.StepPlan(
            epoch=epoch,
            step_id=self.step_id,
            release_slots=column(self.release_slots),
            new_sequences=self.new_sequences,
            append_slots=column(self.append_slots),
            append_blocks=column(self.append_blocks),
            prefill_slots=column([chunk.slot for chunk in self.chunks]),
            prefill_starts=column([chunk.start for chunk in self.chunks]),
            prefill_counts=column([chunk.count for chunk in self.chunks]),
            prefill_samples=column([chunk.samples for chunk in self.chunks]),
            join_slots=column(self.join_slots),
            leave_slots=column(self.leave_slots),
            iterations=self.iterations,
            mask_slots=column(self.mask_slots),
            masks=b"".join([mask.data for mask in self.masks]),
            timeout_ms=self.timeout_ms,
        )

    def sample_under_mask(self, request: Request) -> None:
        """The constrained request samples in this plan."""
        assert request.slot is not None
        assert request.mask is not None
        self.mask_slots.append(request.slot)
        self.masks.append(request.mask)


def float_column(values: Sequence[float]) -> bytes:
    """Numbers as a little-endian float32 column of executor.proto."""
    return np.array(values, dtype="<f4").tobytes()


def new_sequence(request: Request, slot: int, blocks: Column, num_cached_tokens: int) -> pb.NewSequence:
    """What the executor is told of a request that takes a slot."""
    return pb.NewSequence(
        slot=slot,
        token_ids=column(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        block_ids=blocks.astype("<i4", copy=False).tobytes(),
        sampling=_sampling_params(request),
        stop_token_ids=column(request.stop_token_ids),
        max_total_tokens=request.max_total_tokens,
    )


def _sampling_params(request: Request) -> pb.SamplingParams:
    sampling = request.sampling
    params = pb.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        choice_index=request.choice_index,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        bias_token_ids=column(list(sampling.logit_bias)),
        bias_values=float_column(list(sampling.logit_bias.values())),
        num_logprobs=request.num_logprobs,
        num_prompt_logprobs=request.num_prompt_logprobs,
    )
    if request.constraint is None:  # masks say which tokens are allowed otherwise
        params.allowed_token_ids = column(sampling.allowed_token_ids)
        params.banned_token_ids = column(sampling.banned_token_ids)
        if sampling.min_tokens:
            params.min_total_tokens = request.num_prompt_tokens + sampling.min_tokens
            params.end_token_ids = column(request.end_token_ids)
    return params


@dataclasses.dataclass(slots=True)
class StepRecord:
    """What a step in flight will bring: read against its result, which ends the flight."""

    step_id: int
    ends_plan: bool  # the last step of its plan
    prefilled: dict[int, Request]  # slot -> request of each chunk
    num_prefill_tokens: int
    decode_slots: Column  # [num_decoding]
    decode_requests: list[Request]  # [num_decoding], in the order of decode_slots
    timeout_s: float = 0.0  # of its plan; 0: none

    @property
    def requests(self) -> Iterator[Request]:
        """All that the step computes for."""
        return itertools.chain(self.prefilled.values(), self.decode_requests)


NO_ROWS: tuple[Column, list[Request]] = (np.zeros(0, dtype=np.int32), [])  # the decode columns of a step without any


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """See StepResult in executor.proto."""

    step_id: int
    partial: bool
    slots: Column  # [num_sampled]
    token_ids: Column  # [num_sampled]
    finish_reasons: Column  # [num_sampled]
    slot_errors: list[tuple[int, str]]
    device_time_ns: int
    logprob_token_ids: bytes
    logprobs: bytes
    logprob_ranks: bytes
    prompt_logprobs: Sequence[pb.PromptLogprobs]


def decode_result(message: pb.StepResult) -> StepResult:
    """Read the executor's message."""
    return StepResult(
        step_id=message.step_id,
        partial=message.partial,
        slots=np.frombuffer(message.slots, dtype="<i4"),
        token_ids=np.frombuffer(message.token_ids, dtype="<i4"),
        finish_reasons=np.frombuffer(message.finish_reasons, dtype="<i4"),
        slot_errors=[(error.slot, error.message) for error in message.slot_errors],
        device_time_ns=message.device_time_ns,
        logprob_token_ids=message.logprob_token_ids,
        logprobs=message.logprobs,
        logprob_ranks=message.logprob_ranks,
        prompt_logprobs=message.prompt_logprobs,
    )
