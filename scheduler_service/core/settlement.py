"""What a step's result changes.

A result is read against the record of its step: the record says whose tokens they are, whatever has happened to the
slots since. Tokens of a request that has ended are dropped; those of a preempted one are appended, and it may end
while it waits; those that were computed from the blocks of a failed step are dropped too, and computed again.
Log-probabilities are kept or dropped with the tokens to which they belong.
"""

import numpy as np

from scheduler_service.core.epoch import Epoch
from scheduler_service.core.masks import allows, forget_mask
from scheduler_service.core.prefix_cache import extend_digests
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.step_plan import StepRecord, StepResult
from scheduler_service.errors import logged_internal_error
from scheduler_service.ipc import PromptLogprobs, TokenLogprobs

FINISH_REASON_STOP = 1  # as in StepResult.finish_reasons and in inference.proto's FinishReason
STEP_TIME_SMOOTHING = 0.2
_ITEM_BYTES = 4  # of int32 and float32


def apply_result(pool: RequestPool, result: StepResult) -> None:
    """Append tokens, end what ended, publish the blocks that filled, and end the step's flight after its last part."""
    epoch = pool.epoch
    assert epoch is not None
    record = epoch.records[0]
    assert result.step_id == record.step_id, f"result of step {result.step_id} where {record.step_id} is due"
    requests = _requests_of(record, result)
    if result.prompt_logprobs:
        _keep_prompt_logprobs(record, result)
    if record.prefilled:
        _note_first_tokens(requests, pool.clock())
    if result.logprob_ranks:
        _send_logprobs(requests, result)
    slots = result.slots.tolist()
    tokens, reasons = result.token_ids.tolist(), result.finish_reasons.tolist()
    for slot, request, token, reason in zip(slots, requests, tokens, reasons, strict=True):
        if request.state is not RequestState.FINISHED and not request.spoiled:
            _accept_token(pool, epoch, request, slot, token, reason)
            pool.counters.output_tokens += 1
    if pool.suspects:
        pool.acquit(requests)
    for slot, message in result.slot_errors:
        _fail_slot(pool, epoch, _holders(record)[slot], message)
    _measure(epoch, record, result)
    if not result.partial:
        pool.counters.steps += 1
        epoch.settle(pool.clock())


def _requests_of(record: StepRecord, result: StepResult) -> list[Request]:
    """The requests of the result's rows; in a steady decode step they are the record's own list."""
    if np.array_equal(result.slots, record.decode_slots):
        return record.decode_requests
    holders = _holders(record)
    return [holders[slot] for slot in result.slots.tolist()]


def _holders(record: StepRecord) -> dict[int, Request]:
    return record.prefilled | dict(zip(record.decode_slots.tolist(), record.decode_requests, strict=True))


def _counts(request: Request) -> bool:
    """Whether what was computed for the request is to be told."""
    return request.state is not RequestState.FINISHED and not request.spoiled


def _keep_prompt_logprobs(record: StepRecord, result: StepResult) -> None:
    """Gather the parts of prompts that the result brings."""
    holders = _holders(record)
    for part in result.prompt_logprobs:
        request = holders[part.slot]
        if _counts(request):
            request.prompt_logprobs.append(part)


def _note_first_tokens(requests: list[Request], now: float) -> None:
    """Prepare for the first tokens among those of `requests`: before them goes what was asked of the prompt."""
    for request in requests:
        if request.first_token_time is None and _counts(request):
            request.first_token_time = now
            if request.num_prompt_logprobs:
                _send_prompt_logprobs(request)


def _send_prompt_logprobs(request: Request) -> None:
    parts, width = request.prompt_logprobs, request.num_prompt_logprobs
    position = 1
    for part in parts:
        assert part.start == position, f"log-probabilities from position {part.start}, where {position} is due"
        position += len(part.ranks) // _ITEM_BYTES
    assert position == request.num_prompt_tokens, f"log-probabilities up to position {position} of the prompt"
    prompt_logprobs = PromptLogprobs(
        stream=request.stream,
        token_ids=b"".join(part.token_ids for part in parts),
        logprobs=b"".join(part.logprobs for part in parts),
        ranks=b"".join(part.ranks for part in parts),
        width=width,
    )
    request.outbox.prompt_logprobs.append(prompt_logprobs)
    if request.kept is not None:
        request.kept.prompt_logprobs = prompt_logprobs
    request.num_prompt_logprobs = 0
    request.prompt_logprobs = []


def _send_logprobs(requests: list[Request], result: StepResult) -> None:
    """Cut the columns, which hold as many numbers for each row as its request asked for."""
    ranks = np.frombuffer(result.logprob_ranks, dtype="<i4").tolist()
    begin, num_read = 0, 0
    for request in requests:
        if not request.num_logprobs:
            continue
        end = begin + request.num_logprobs * _ITEM_BYTES
        if _counts(request):
            token_ids, logprobs = result.logprob_token_ids[begin:end], result.logprobs[begin:end]
            entry = TokenLogprobs(request.stream, token_ids, logprobs, ranks[num_read])
            request.outbox.logprobs.append(entry)
            if request.kept is not None:
                request.kept.logprobs.append(entry)
        begin, num_read = end, num_read + 1
    assert (begin, num_read) == (len(result.logprobs), len(ranks)), "log-probabilities of other rows than asked for"


def _accept_token(pool: RequestPool, epoch: Epoch, request: Request, slot: int, token: int, reason: int) -> None:
    token_ids = request.token_ids
    token_ids.append(token)
    request.outbox.streams.append(request.stream)
    request.outbox.token_ids.append(token)
    if (len(token_ids) - 1) % epoch.blocks.block_size == 0:
        _publish_last_block(epoch, request, slot)
    if request.constraint is not None and not allows(request, token):
        cause = f"request {request.request_id}: the executor sampled token {token}, which the mask forbids"
        pool.fail(request, logged_internal_error(cause))
    elif reason:
        pool.finish(request, reason, token if reason == FINISH_REASON_STOP else None)
    elif request.constraint is not None:
        forget_mask(pool, request)


def _publish_last_block(epoch: Epoch, request: Request, slot: int) -> None:
    """Let later prompts hit the block whose last position is written, if it still is the request's."""
    if request.slot != slot:
        return
    extend_digests(request.block_digests, request.token_ids, epoch.blocks.block_size, request.cache_salt)
    num_written = (len(request.token_ids) - 1) // epoch.blocks.block_size
    epoch.blocks.publish(slot, request.block_digests, request.token_ids, num_written - 1, num_written)


def _fail_slot(pool: RequestPool, epoch: Epoch, request: Request, message: str) -> None:
    """End a request whose step failed; whoever hit a block that it had computed computes again.

    Later plans may have read such a block already, so what they bring for those who hit it, an error included, does
    not count; and whatever is built upon it is forgotten, even if its owner is gone.
    """
    if request.spoiled:
        return
    if request.state is not RequestState.FINISHED:
        cause = f"the executor failed on request {request.request_id}: {message}"
        pool.fail(request, logged_internal_error(cause, told=f", {message}"))
    first = request.num_cached_blocks
    for digest in request.block_digests[first : first + 1]:
        epoch.blocks.retract(digest, first)
        for other in list(pool.requests.values()):
            if other.num_cached_blocks > first and other.block_digests[first] == digest:
                if other.state is RequestState.RUNNING:
                    pool.preempt(other)
                other.spoiled = True


def _measure(epoch: Epoch, record: StepRecord, result: StepResult) -> None:
    """Follow the device times by which plans of several steps are sized and stalls foreseen."""
    if record.num_prefill_tokens:
        if result.partial or not len(record.decode_slots):
            token_ns = result.device_time_ns / record.num_prefill_tokens
            epoch.prefill_token_ns = _smoothed(epoch.prefill_token_ns, token_ns)
    elif len(result.slots):  # a step whose rows were all done took no time
        epoch.decode_step_ns = _smoothed(epoch.decode_step_ns, result.device_time_ns)


def _smoothed(average: float, value: float) -> float:
    return average + STEP_TIME_SMOOTHING * (value - average) if average else value
