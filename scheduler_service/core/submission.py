"""What a front end submits, as the requests that the core keeps."""

import time
from array import array

from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import Kept, Request, RequestState
from scheduler_service.core.resumption import Told
from scheduler_service.errors import ContextLengthExceeded, DeadlineExceeded, ExecutorUnavailable
from scheduler_service.ipc import ModelInfo, Submit


def read_submission(message: Submit, outbox: Outbox, model: ModelInfo | None) -> list[Request]:
    """The choices of a new request, in the order of their indices; `model` is that of the last executor.

    Raises: DeadlineExceeded, ExecutorUnavailable, ContextLengthExceeded.
    """
    if message.deadline is not None and message.deadline <= time.monotonic():
        raise DeadlineExceeded("the deadline passed before the request was queued")
    if model is None:
        raise ExecutorUnavailable("no executor has connected yet")
    num_tokens, limit = len(message.token_ids) // 4, min(model.max_model_len, model.max_cache_tokens)
    wanted = limit if message.max_tokens is None else num_tokens + message.max_tokens
    if num_tokens >= limit or wanted > limit:
        raise ContextLengthExceeded(f"{wanted} tokens are wanted, {limit} fit", field="stop.max_tokens")
    choices = [_choice(message, outbox, stream, index, wanted) for index, stream in enumerate(message.streams)]
    if message.sampling.prompt_logprobs is not None:
        leader, *others = choices
        _await_prompt_logprobs(message, leader, others)
    return choices


def read_resubmission(message: Submit, outbox: Outbox) -> tuple[list[Request], list[Told]]:
    """The choices of a request that a dead core had, as far as they had come, and what their client was told."""
    choices, told = list[Request](), list[Told]()
    for stream, progress in zip(message.streams, message.progress, strict=True):
        request = _choice(message, outbox, stream, progress.choice_index, progress.max_total_tokens)
        request.token_ids.frombytes(progress.token_ids)
        request.started, request.queue_time_ns = progress.was_told_start, progress.queue_time_ns
        request.cached_tokens, request.first_token_time = progress.cached_tokens, progress.first_token_time
        request.recoveries = progress.recoveries
        if progress.end is not None:
            request.state = RequestState.FINISHED
            request.kept = Kept(end=progress.end)
        choices.append(request)
        told.append(Told(progress.was_told_start, request.num_output_tokens, not progress.lacks_prompt_logprobs))
    for leader, progress in zip(choices, message.progress, strict=True):
        if progress.lacks_prompt_logprobs:
            _await_prompt_logprobs(message, leader, [request for request in choices if request is not leader])
    return choices, told


def _choice(message: Submit, outbox: Outbox, stream: int, index: int, max_total_tokens: int) -> Request:
    return Request(
        request_id=message.request_id,
        tenant=message.tenant,
        detach_s=message.detach_s,
        outbox=outbox,
        stream=stream,
        token_ids=array("i", message.token_ids),
        num_prompt_tokens=len(message.token_ids) // 4,
        max_total_tokens=max_total_tokens,
        sampling=message.sampling,
        stop_token_ids=message.stop_token_ids,
        priority=message.priority,
        cache_salt=message.cache_salt,
        arrival_time=message.arrival,
        deadline=message.deadline,
        choice_index=index,
        end_token_ids=message.end_token_ids,
        constraint=message.constraint,
    )


def _await_prompt_logprobs(message: Submit, leader: Request, others: list[Request]) -> None:
    """The leader gathers the prompt's log-probabilities, and no other choice has a token before."""
    assert message.sampling.prompt_logprobs is not None
    leader.num_prompt_logprobs = 1 + message.sampling.prompt_logprobs
    for request in others:
        request.leader = leader
