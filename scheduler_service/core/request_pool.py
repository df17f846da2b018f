"""Every living request, and the ways in which one begins, pauses and ends."""

import dataclasses
import time
from collections.abc import Callable

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.core.epoch import Epoch, ExecutorLimits
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.waiting_queue import Order, WaitingQueue
from scheduler_service.errors import (
    DeadlineExceeded,
    DuetError,
    DuplicateRequest,
    ExecutorUnavailable,
    InvalidRequest,
    QueueFull,
)
from scheduler_service.ipc import Failed, Finished, Load, Started

QUEUE_FULL_RETRY_S = 1.0


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


class RequestPool:
    """Requests by id and choice, the waiting queue, and the epoch in force."""

    def __init__(self, order: Order, max_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests: dict[tuple[str, int], Request] = {}  # by id and choice index
        self.clock = clock  # seconds, as in Request.arrival_time
        self.waiting = WaitingQueue(order)
        self.compiling: set[Request] = set()  # on their way to the waiting queue
        self.mask_latency_ns = 0.0  # moving average from a token to the mask of the next one; 0: none yet
        self.unmasked: list[Request] = []  # those whose next token lacks a mask since the last look of MaskSource
        self.epoch: Epoch | None = None  # None: no executor
        self.counters = Counters()
        self._choices: dict[str, list[Request]] = {}  # id -> its living choices
        self._max_waiting = max_waiting
        self._num_arrivals = 0

    def submit(self, *choices: Request) -> None:
        """Queue a new request: its choices, in the order of their indices, each of which counts as one that waits.

        Raises: DuplicateRequest, InvalidRequest, QueueFull; nothing is queued then.
        """
        request_id = choices[0].request_id
        if request_id in self._choices:
            raise DuplicateRequest(f"request_id {request_id!r} is in use", field="request_id")
        if len(choices) > self._max_waiting:
            message = f"n is {len(choices)}, and no more than {self._max_waiting} may wait"
            raise InvalidRequest(message, field="sampling.n")
        if self.num_waiting + len(choices) > self._max_waiting:
            raise QueueFull(f"{self.num_waiting} requests are waiting already", retry_after_s=QUEUE_FULL_RETRY_S)
        self._choices[request_id] = list(choices)
        for request in choices:
            self._num_arrivals += 1
            request.arrival = self._num_arrivals
            self.requests[request_id, request.choice_index] = request
            if request.constraint is None:
                self.waiting.push(request)
            else:
                request.state = RequestState.COMPILING
                self.compiling.add(request)
                self.unmasked.append(request)

    @property
    def num_waiting(self) -> int:
        """Requests that hold no slot."""
        return len(self.waiting) + len(self.compiling)

    def choices_of(self, request_id: str) -> list[Request]:
        """The living choices of a request; none where no such request is alive."""
        return list(self._choices.get(request_id, ()))

    def finish(self, request: Request, reason: int, stop_token_id: int | None = None) -> None:
        """End a living request and tell its stream; `reason` is a FinishReason of inference.proto."""
        self.drop(request)
        first_token_s = 0.0 if request.first_token_time is None else request.first_token_time - request.arrival_time
        request.outbox.finished.append(
            Finished(
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
        )

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
        request.outbox.started.append(
            Started(request.stream, request.num_prompt_tokens, request.cached_tokens, request.queue_time_ns)
        )

    def fail(self, request: Request, error: DuetError) -> None:
        """End a living request by an error and tell its stream."""
        self.drop(request)
        request.outbox.failed.append(failure(request.stream, error))

    def drop(self, request: Request) -> None:
        """End a living request; tokens that plans in flight still bring are dropped."""
        assert request.state is not RequestState.FINISHED
        if request.state is RequestState.RUNNING:
            assert self.epoch is not None
            self.epoch.unseat(request)
        elif request.state is RequestState.COMPILING:
            self.compiling.remove(request)
        else:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED
        del self.requests[request.request_id, request.choice_index]
        choices = self._choices[request.request_id]
        choices.remove(request)
        if not choices:
            del self._choices[request.request_id]
        self.counters.finished_requests += 1

    def drop_all_of(self, outbox: Outbox) -> None:
        """End every request of a front end that is gone."""
        for request in [request for request in self.requests.values() if request.outbox is outbox]:
            self.drop(request)

    def preempt(self, request: Request) -> None:
        """Move a running request back to the queue, its known tokens kept, to be computed again.

        Tokens in flight stay valid and are appended when they come; until then it is not admitted again.
        """
        assert self.epoch is not None
        self.epoch.unseat(request)
        request.in_flight_until = self.epoch.next_step_id - 1
        request.preemptions += 1
        self.counters.preemptions += 1
        self._queue_again(request)

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
        for request in [r for r in self.requests.values() if r.max_total_tokens > limits.max_total_tokens]:
            message = f"the new executor holds {limits.max_total_tokens} tokens, too few for this request"
            self.fail(request, ExecutorUnavailable(message))
        return epoch

    def end_epoch(self) -> None:
        """The executor is lost, with every KV entry, every slot and the tokens of all plans in flight."""
        assert self.epoch is not None
        running, self.epoch = list(self.epoch.running.values()), None
        for request in running:
            request.slot = None
            request.recoveries += 1
            self._queue_again(request)
        for request in self.waiting:
            request.in_flight_until = 0
            request.block_digests.clear()  # the next executor may have blocks of another size
            request.num_cached_blocks = 0

    def _queue_again(self, request: Request) -> None:
        request.state = RequestState.WAITING
        request.num_prefilled = 0
        self.waiting.push(request)

    def load(self, uptime_s: float) -> Load:
        """A snapshot of queues, blocks and totals."""
        epoch, counters = self.epoch, self.counters
        return Load(
            waiting_requests=self.num_waiting,
            running_requests=len(epoch.running) if epoch else 0,
            max_running_requests=epoch.limits.num_slots if epoch else 0,
            used_blocks=epoch.blocks.num_blocks - epoch.blocks.num_free_blocks if epoch else 0,
            cached_blocks=epoch.blocks.num_cached_free_blocks if epoch else 0,
            total_blocks=epoch.blocks.num_blocks if epoch else 0,
            block_size=epoch.blocks.block_size if epoch else 0,
            prompt_tokens_total=counters.prompt_tokens,
            cached_tokens_total=counters.cached_tokens,
            prefill_tokens_total=counters.prefill_tokens,
            output_tokens_total=counters.output_tokens,
            finished_requests_total=counters.finished_requests,
            preemptions_total=counters.preemptions,
            steps_total=counters.steps,
            uptime_seconds=uptime_s,
        )


def _nanoseconds(duration_s: float) -> int:
    """Never negative: a front end may have read the clock later than the core."""
    return max(0, int(duration_s * 1e9))


def failure(stream: int, error: DuetError) -> Failed:
    """The error as the front end hears it."""
    return Failed(stream, error.code.name, type(error).__name__, error.message, error.field, error.retry_after_s)
