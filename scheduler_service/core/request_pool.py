"""Every living request, and the ways in which one begins, pauses and ends."""

import dataclasses
import time
from collections.abc import Callable, Iterable

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.core.epoch import Epoch, ExecutorLimits
from scheduler_service.core.outbox import Outbox, failure
from scheduler_service.core.request import Request, RequestKey, RequestState
from scheduler_service.core.retained import Retained
from scheduler_service.core.waiting_queue import Order, WaitingQueue
from scheduler_service.errors import (
    DeadlineExceeded,
    DuetError,
    DuplicateRequest,
    ExecutorUnavailable,
    InvalidRequest,
    QueueFull,
    ServerDraining,
    logged_internal_error,
)
from scheduler_service.ipc import Failed, Finished, Started

QUEUE_FULL_RETRY_S = 1.0
MAX_SUSPICIONS = 2  # losses of an executor after which a request that was in a plan each time is tried alone


@dataclasses.dataclass
class Counters:
    """Totals since the core started: see Load in inference.proto."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0
    finished_requests: int = 0
    preemptions: int = 0
    steps: int = 0
    executor_losses: int = 0
    idle_checks: int = 0
    idle_check_failures: int = 0


class RequestPool:
    """Requests by id and choice, the waiting queue, and the epoch in force."""

    def __init__(self, order: Order, max_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests: dict[tuple[RequestKey, int], Request] = {}  # the living ones, by key and choice index
        self.retained: dict[RequestKey, Retained] = {}  # those with detach_s, and their results
        self.unheard = Outbox()  # where the news of those goes who have no client
        self.clock = clock  # seconds, as in Request.arrival_time
        self.waiting = WaitingQueue(order)
        self.compiling: set[Request] = set()  # on their way to the waiting queue
        self.quarantine: dict[Request, None] = {}  # those to be tried alone, in order
        self.suspects: set[Request] = set()  # those with suspicions
        self.is_draining = False
        self.mask_latency_ns = 0.0  # moving average from a token to the mask of the next one; 0: none yet
        self.unmasked: list[Request] = []  # those whose next token lacks a mask since the last look of MaskSource
        self.epoch: Epoch | None = None  # None: no executor
        self.counters = Counters()
        self._choices: dict[RequestKey, list[Request]] = {}  # its living choices
        self._max_waiting = max_waiting
        self._num_arrivals = 0

    def submit(self, *choices: Request) -> None:
        """Queue a new request: its choices, in the order of their indices, each of which counts as one that waits.

        Raises: DuplicateRequest, InvalidRequest, QueueFull, ServerDraining; nothing is queued then.
        """
        first = choices[0]
        if first.key in self._choices or first.key in self.retained:
            raise DuplicateRequest(f"request_id {first.request_id!r} is in use", field="request_id")
        if self.is_draining:
            raise ServerDraining("the server is draining")
        if len(choices) > self._max_waiting:
            message = f"n is {len(choices)}, and no more than {self._max_waiting} may wait"
            raise InvalidRequest(message, field="sampling.n")
        if self.num_waiting + len(choices) > self._max_waiting:
            raise QueueFull(f"{self.num_waiting} requests are waiting already", retry_after_s=QUEUE_FULL_RETRY_S)
        self.adopt(*choices)

    def adopt(self, *choices: Request) -> None:
        """Queue the choices of a request that no other core has, however many wait and whatever the server does."""
        if choices[0].detach_s is not None:
            self.retained[choices[0].key] = Retained(list(choices), choices[0].detach_s)
        for request in choices:
            if request.state is not RequestState.FINISHED:
                self._enter(request)
        if self.epoch is not None:
            self._fail_too_long(choices, self.epoch.limits)

    def replace(self, request: Request, other: Request) -> None:
        """Let `other` stand for a choice, as if no executor had ever seen that."""
        if request.state is not RequestState.FINISHED:
            self.drop(request)
        if (retained := self.retained.get(request.key)) is not None:
            retained.replace(request, other)
        if other.state is not RequestState.FINISHED:
            self._enter(other)

    def forget(self, retained: Retained) -> None:
        """End a request that nobody waits for, and let go of its result."""
        del self.retained[retained.choices[0].key]
        for request in retained.choices:
            if request.state is not RequestState.FINISHED:
                self.drop(request)

    def _enter(self, request: Request) -> None:
        self._num_arrivals += 1
        request.arrival = self._num_arrivals
        self._choices.setdefault(request.key, []).append(request)
        self.requests[request.key, request.choice_index] = request
        if request.constraint is None:
            self.waiting.push(request)
        else:
            request.state = RequestState.COMPILING
            self.compiling.add(request)
            self.unmasked.append(request)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no slot."""
        return len(self.waiting) + len(self.compiling) + len(self.quarantine)

    def choices_of(self, key: RequestKey) -> list[Request]:
        """The living choices of a request; none where no such request is alive."""
        return list(self._choices.get(key, ()))

    def finish(self, request: Request, reason: int, stop_token_id: int | None = None) -> None:
        """End a living request and tell its stream; `reason` is a FinishReason of inference.proto."""
        self.drop(request)
        first_token_s = 0.0 if request.first_token_time is None else request.first_token_time - request.arrival_time
        end = Finished(
            stream=request.stream,
            reason=reason,
            stop_token_id=stop_token_id,
            prompt_tokens=request.num_prompt_tokens,
            cached_tokens=request.cached_tokens,
            output_tokens=request.num_output_tokens,
            preemptions=request.preemptions,
            recoveries=request.recoveries,
            queue_time_ns=request.queue_time_ns,
            time_to_first_token_ns=_nanoseconds(first_token_s),
        )
        request.outbox.finished.append(end)
        self._keep_end(request, end)

    def cancel(self, request: Request, now: float) -> None:
        """End a living request at somebody's wish; `now` in monotonic seconds."""
        self.start(request, now)
        self.finish(request, pb.FINISH_REASON_CANCELLED)

    def start(self, request: Request, now: float) -> None:
        """Tell the stream, once, that its request has left the queue."""
        if request.started:
            return
        request.started = True
        request.queue_time_ns = _nanoseconds(now - request.arrival_time)
        request.outbox.started.append(started(request))

    def fail(self, request: Request, error: DuetError) -> None:
        """End a living request by an error and tell its stream."""
        self.drop(request)
        end = failure(request.stream, error)
        request.outbox.failed.append(end)
        self._keep_end(request, end)

    def _keep_end(self, request: Request, end: Finished | Failed) -> None:
        if request.kept is not None:
            request.kept.end = end
            self.retained[request.key].see_end(self.clock())

    def drop(self, request: Request) -> None:
        """End a living request; tokens that plans in flight still bring are dropped."""
        assert request.state is not RequestState.FINISHED
        if request.state is RequestState.RUNNING:
            assert self.epoch is not None
            self.epoch.unseat(request)
        elif request.state is RequestState.COMPILING:
            self.compiling.remove(request)
        elif request.state is RequestState.QUARANTINED:
            del self.quarantine[request]
        else:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        self.suspects.discard(request)
        del self.requests[request.key, request.choice_index]
        choices = self._choices[request.key]
        choices.remove(request)
        if not choices:
            del self._choices[request.key]
        self.counters.finished_requests += 1

    def preempt(self, request: Request) -> None:
        """Move a running request back to the queue, its known tokens kept, to be computed again.

        Tokens in flight stay valid and are appended when they come; until then it is not admitted again.
        """
        self.put_back(request)
        request.preemptions += 1
        self.counters.preemptions += 1

    def put_back(self, request: Request) -> None:
        """The same where nobody took its blocks."""
        assert self.epoch is not None
        self.epoch.unseat(request)
        request.in_flight_until = self.epoch.next_step_id - 1
        self._queue_again(request)

    def acquit(self, requests: Iterable[Request]) -> None:
        """An executor outlived a token of these. Less would let one go free whose prompt kills at its end."""
        for request in requests:
            request.suspicions = 0
            self.suspects.discard(request)

    def expire(self, now: float) -> None:
        """Fail every request whose deadline has passed, waiting or running; `now` in monotonic seconds."""
        late = [r for r in self.requests.values() if r.deadline is not None and r.deadline <= now]
        for request in late:
            self.fail(request, DeadlineExceeded("the deadline passed"))

    def fail_older_than(self, arrival_time: float, message: str) -> None:
        """Fail with UNAVAILABLE every request that arrived before `arrival_time`, monotonic seconds."""
        for request in [r for r in self.requests.values() if r.arrival_time < arrival_time]:
            self.fail(request, ExecutorUnavailable(message))

    def begin_epoch(self, limits: ExecutorLimits) -> Epoch:
        """Start on an executor whose slots and blocks are all empty; returns what is known of it."""
        assert self.epoch is None
        epoch = self.epoch = Epoch(limits)
        self._fail_too_long(list(self.requests.values()), limits)
        return epoch

    def end_epoch(self, *, in_order: bool = False) -> None:
        """The executor is lost, with every KV entry, every slot and the tokens of all plans in flight.

        Unless it stopped `in_order`, it may have died of any request in a plan that it did not acknowledge.
        """
        assert self.epoch is not None
        epoch, self.epoch = self.epoch, None
        self.counters.executor_losses += 1
        suspects = [] if in_order else [r for r in epoch.unacknowledged() if r.state is not RequestState.FINISHED]
        for request in suspects:
            request.suspicions += 1
        self.suspects.update(suspects)
        for request in epoch.running.values():
            request.slot = None
            request.recoveries += 1
            self._queue_again(request)
        for request in [request for request in self.waiting if request.suspicions >= MAX_SUSPICIONS]:
            self.waiting.remove(request)
            self._queue_again(request)
        for request in (*self.waiting, *self.quarantine):
            request.in_flight_until = 0
            request.block_digests.clear()  # the next executor may have blocks of another size
            request.num_cached_blocks = 0
        if epoch.on_trial in suspects:
            self._convict(epoch.on_trial)

    def check_idle(self) -> None:
        """Assert what holds when no request is alive."""
        queues = (self.waiting, self.compiling, self.quarantine, self.suspects, self._choices)
        assert not any(len(queue) for queue in queues), "a request that has ended is still queued"

    def _fail_too_long(self, requests: Iterable[Request], limits: ExecutorLimits) -> None:
        message = f"the new executor holds {limits.max_total_tokens} tokens, too few for this request"
        for request in requests:
            if request.state is not RequestState.FINISHED and request.max_total_tokens > limits.max_total_tokens:
                self.fail(request, ExecutorUnavailable(message))

    def _convict(self, request: Request) -> None:
        cause = f"request {request.request_id}: the executor died each time it ran, the last time alone"
        told = ": the executor died each time it ran this request, the last time alone"
        self.fail(request, logged_internal_error(cause, told=told))

    def _queue_again(self, request: Request) -> None:
        request.num_prefilled = 0
        if request.suspicions >= MAX_SUSPICIONS:
            request.state = RequestState.QUARANTINED
            self.quarantine[request] = None
        else:
            request.state = RequestState.WAITING
            self.waiting.push(request)


def _nanoseconds(duration_s: float) -> int:
    """Never negative: a front end may have read the clock later than the core."""
    return max(0, int(duration_s * 1e9))


def started(request: Request) -> Started:
    """The admission of a request as the front end hears it."""
    return Started(
        stream=request.stream,
        prompt_tokens=request.num_prompt_tokens,
        cached_tokens=request.cached_tokens,
        queue_time_ns=request.queue_time_ns,
        seed=request.sampling.seed,
    )
