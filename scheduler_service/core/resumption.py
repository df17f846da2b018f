"""How a request passes from one client to the next, and from a core that died to this one."""

import dataclasses
from collections.abc import Sequence

import msgspec

from scheduler_service.core.outbox import Outbox, failure
from scheduler_service.core.request import Request, RequestKey, RequestState
from scheduler_service.core.request_pool import RequestPool, started
from scheduler_service.core.retained import NO_CLIENT
from scheduler_service.errors import DuplicateRequest, InvalidRequest, Superseded
from scheduler_service.ipc import Finished


@dataclasses.dataclass(frozen=True)
class Told:
    """What the client that takes a choice over was told of it before, by whatever core."""

    start: bool = False
    num_tokens: int = 0
    prompt_logprobs: bool = False


def detach(pool: RequestPool, request: Request) -> None:
    """The client of a living request with `detach_s` went away."""
    request.outbox, request.stream = pool.unheard, NO_CLIENT
    pool.retained[request.key].see_client_leave(pool.clock())


def leave_all(pool: RequestPool, outbox: Outbox) -> None:
    """A front end is gone: its requests end, but for those that outlive their clients."""
    for request in [request for request in pool.requests.values() if request.outbox is outbox]:
        if request.detach_s is None:
            pool.drop(request)
        else:
            detach(pool, request)


def known_choices(pool: RequestPool, key: RequestKey) -> list[Request] | None:
    """The choices of a request that can be taken over, in the order of their indices; None: no such request."""
    if (retained := pool.retained.get(key)) is not None:
        return retained.choices
    return pool.choices_of(key) or None


def resume(
    pool: RequestPool, choices: Sequence[Request], outbox: Outbox, streams: Sequence[int], asked_at: float
) -> bool:
    """A client that asked at `asked_at`, time.monotonic() seconds, takes a request over, from its very start.

    False: that cannot be told any more, and the request is forgotten; to be generated anew.
    Raises: InvalidRequest, where it wants other choices; Superseded, where another client asked later.
    """
    retained = pool.retained.get(choices[0].key)
    if retained is None:
        raise InvalidRequest("a request without detach_seconds cannot be resumed", field="resume_offset")
    if len(choices) != len(streams):
        raise InvalidRequest(f"the request has {len(choices)} continuations, not {len(streams)}", field="sampling.n")
    if asked_at < retained.asked_at:
        raise _superseded(choices[0])
    if not all(_can_tell(request, Told()) for request in choices):
        for request in choices:
            _dismiss_client(request)
        pool.forget(retained)
        return False
    for request, stream in zip(choices, streams, strict=True):
        take_over(request, outbox, stream, Told())
    retained.see_client_come(pool.clock(), asked_at)
    return True


def take_over(request: Request, outbox: Outbox, stream: int, told: Told) -> None:
    """Let `stream` have the choice, its end included, and tell it what it was not told; whoever had it is told so."""
    _dismiss_client(request)
    request.outbox, request.stream = outbox, stream
    _tell(request, told)


def merge(pool: RequestPool, choices: Sequence[Request], resubmitted: Sequence[Request], told: Sequence[Told]) -> None:
    """A front end brings a request that is here already: the longer tokens win, and who asked last is the client.

    Raises: DuplicateRequest, where it is another request by the same id.
    """
    by_index = {request.choice_index: request for request in choices}
    pairs = [(by_index.get(other.choice_index), other) for other in resubmitted]
    if not _is_same(choices[0], resubmitted[0]):
        raise DuplicateRequest(f"request_id {choices[0].request_id!r} is in use", field="request_id")
    retained, asked_at = pool.retained.get(choices[0].key), resubmitted[0].arrival_time
    is_late = retained is not None and asked_at < retained.asked_at
    can_tell = all(_can_tell(one, was_told) for (one, _), was_told in zip(pairs, told, strict=True) if one is not None)
    for (request, other), was_told in zip(pairs, told, strict=True):
        if request is None:  # it has ended
            _dismiss_client(other)
        elif is_late:
            _lend_tokens(pool, request, other)
        elif can_tell and not _is_behind(request, other):
            take_over(request, other.outbox, other.stream, was_told)
        else:
            _dismiss_client(request)
            pool.replace(request, other)
    if retained is not None and not is_late:
        retained.see_client_come(pool.clock(), asked_at)


def _lend_tokens(pool: RequestPool, request: Request, other: Request) -> None:
    """The resubmitted choice has no client any more, and maybe tokens that the one that is here lacks."""
    outbox, stream = other.outbox, other.stream
    outbox.failed.append(failure(stream, _superseded(other)))
    wants_logprobs = other.num_logprobs or other.sampling.prompt_logprobs is not None  # which nobody has
    if _is_behind(request, other) and not wants_logprobs:
        other.outbox, other.stream = request.outbox, request.stream
        pool.replace(request, other)
        _tell(other, Told(request.started, request.num_output_tokens))


def _is_same(request: Request, other: Request) -> bool:
    """Whether two choices by one id are of one request; what was generated may differ at near ties."""
    prompts = [one.token_ids[: one.num_prompt_tokens] for one in (request, other)]
    return prompts[0] == prompts[1] and (request.sampling, request.constraint) == (other.sampling, other.constraint)


def _is_behind(request: Request, other: Request) -> bool:
    return request.state is not RequestState.FINISHED and len(request.token_ids) < len(other.token_ids)


def _can_tell(request: Request, told: Told) -> bool:
    """Whether everything that a client was not told is still there: a core gets tokens of another, and nothing else."""
    kept = request.kept
    lacks_prompt = request.sampling.prompt_logprobs is not None and not told.prompt_logprobs
    if lacks_prompt and request.choice_index == 0 and not request.num_prompt_logprobs:
        if kept is None or kept.prompt_logprobs is None:
            return False
    num_kept = 0 if kept is None else len(kept.logprobs)
    return not request.num_logprobs or told.num_tokens >= request.num_output_tokens - num_kept


def _tell(request: Request, told: Told) -> None:
    """Tell the choice's client what it was not told; see _can_tell."""
    kept, outbox, stream = request.kept, request.outbox, request.stream
    if request.started and not told.start:
        outbox.started.append(started(request))
    if kept is not None and kept.prompt_logprobs is not None and not told.prompt_logprobs:
        outbox.prompt_logprobs.append(msgspec.structs.replace(kept.prompt_logprobs, stream=stream))
    news = request.token_ids[request.num_prompt_tokens + told.num_tokens :]
    outbox.streams.extend([stream] * len(news))
    outbox.token_ids.extend(news)
    if kept is not None:
        logprobs = kept.logprobs[max(0, len(kept.logprobs) - len(news)) :] if news else []
        outbox.logprobs += [msgspec.structs.replace(each, stream=stream) for each in logprobs]
        if isinstance(kept.end, Finished):
            outbox.finished.append(msgspec.structs.replace(kept.end, stream=stream))
        elif kept.end is not None:
            outbox.failed.append(msgspec.structs.replace(kept.end, stream=stream))


def _dismiss_client(request: Request) -> None:
    """Tell the client of a living choice, where there is one, that another has it."""
    if request.state is not RequestState.FINISHED and request.stream != NO_CLIENT:
        request.outbox.failed.append(failure(request.stream, _superseded(request)))


def _superseded(request: Request) -> Superseded:
    return Superseded(f"request {request.request_id!r} was resumed elsewhere")


def expire(pool: RequestPool, now: float) -> None:
    """Forget what nobody came back for; `now` in time.monotonic() seconds."""
    for retained in [retained for retained in pool.retained.values() if (retained.expires_at or now) < now]:
        pool.forget(retained)
