"""The scheduler core without gRPC: real queues, blocks and settlement, a fake executor, and a clock of its own."""

import dataclasses
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.core.epoch import Epoch, ExecutorLimits
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import Request
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.scheduler import Policy, Scheduler
from scheduler_service.core.settlement import apply_result
from scheduler_service.core.step_plan import StepPlan, decode_result
from scheduler_service.core.waiting_queue import ORDERS
from scheduler_service.ipc import Sampling
from tests.unit.core_fake import (
    CANCELLED,
    LENGTH,
    STOP,
    VOCAB_SIZE,
    FakeExecutor,
    RowLogprobs,
    continuation,
    row_logprobs,
)

__all__ = [
    "CANCELLED", "LENGTH", "LIMITS", "STOP", "VOCAB_SIZE", "Core", "FakeExecutor", "RowLogprobs", "continuation",
    "new_request", "row_logprobs", "small_cache",
]  # fmt: skip

GREEDY = Sampling(temperature=0.0)
LIMITS = ExecutorLimits(
    block_size=4, num_blocks=64, num_slots=8, max_tokens_per_step=16, max_model_len=256, max_inflight_plans=3
)


def small_cache(num_blocks: int) -> ExecutorLimits:
    """An executor on which few requests fit."""
    return dataclasses.replace(LIMITS, num_blocks=num_blocks)


def new_request(
    request_id: str,
    prompt: Iterable[int],
    max_tokens: int,
    *,
    outbox: Outbox | None = None,
    stream: int = 0,
    stop: Sequence[int] = (),
    priority: int = 0,
    salt: str = "",
    arrival_time: float = 0.0,
    deadline: float | None = None,
    sampling: Sampling = GREEDY,
    choice_index: int = 0,
) -> Request:
    token_ids = array("i", prompt)
    return Request(
        request_id=request_id,
        outbox=outbox or Outbox(),
        stream=stream,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        max_total_tokens=len(token_ids) + max_tokens,
        sampling=sampling,
        stop_token_ids=list(stop),
        priority=priority,
        cache_salt=salt,
        arrival_time=arrival_time,
        deadline=deadline,
        choice_index=choice_index,
        num_prompt_logprobs=0 if sampling.prompt_logprobs is None else 1 + sampling.prompt_logprobs,
    )


class Core:
    """Pool and scheduler in front of a fake executor."""

    def __init__(
        self,
        limits: ExecutorLimits = LIMITS,
        *,
        inflight: int = 1,
        order: str = "fcfs",
        max_waiting: int = 1000,
        max_decode_stall_s: float = 0.4,
    ) -> None:
        self.limits = limits
        self.pool = RequestPool(ORDERS[order], max_waiting, clock=lambda: self.now)
        self.scheduler = Scheduler(self.pool, Policy(inflight, max_decode_stall_s))
        self.outbox = Outbox()
        self.now = 0.0
        self.num_submitted = 0
        self.plans: list[StepPlan] = []
        self.begin_epoch()

    @property
    def epoch(self) -> Epoch:
        assert self.pool.epoch is not None
        return self.pool.epoch

    def begin_epoch(self, limits: ExecutorLimits | None = None) -> None:
        self.executor = FakeExecutor(limits or self.limits)
        self.in_flight: deque[list[pb.StepResult]] = deque()
        self.pool.begin_epoch(self.executor.limits)

    def submit(
        self,
        prompt: Iterable[int],
        max_tokens: int,
        *,
        request_id: str | None = None,
        stop: Sequence[int] = (),
        priority: int = 0,
        salt: str = "",
        deadline: float | None = None,
        sampling: Sampling = GREEDY,
    ) -> Request:
        request = self._new_choice(
            prompt,
            max_tokens,
            request_id=request_id,
            stop=stop,
            priority=priority,
            salt=salt,
            deadline=deadline,
            sampling=sampling,
        )
        self.pool.submit(request)
        return request

    def submit_choices(self, n: int, prompt: Sequence[int], max_tokens: int, **options: Any) -> list[Request]:
        """One request for n continuations; `options` as of `submit`."""
        options.setdefault("request_id", f"request-of-{self.num_submitted + 1}")
        choices = [self._new_choice(prompt, max_tokens, choice_index=index, **options) for index in range(n)]
        for request in choices[1:]:
            request.num_prompt_logprobs, request.leader = 0, choices[0]
        self.pool.submit(*choices)
        return choices

    def _new_choice(self, prompt: Iterable[int], max_tokens: int, *, request_id: str | None, **options: Any) -> Request:
        self.num_submitted += 1
        return new_request(
            request_id or f"request-{self.num_submitted}",
            prompt,
            max_tokens,
            outbox=self.outbox,
            stream=self.num_submitted,
            arrival_time=self.now,
            **options,
        )

    def send(self) -> StepPlan | None:
        """Schedule one plan and give it to the executor; its results wait for `settle`."""
        plan = self.scheduler.schedule(self.now)
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append(self.executor.run(plan.encode(epoch=1)))
        return plan

    def settle(self) -> None:
        """Apply the results of the oldest plan in flight."""
        for result in self.in_flight.popleft():
            apply_result(self.pool, decode_result(result))
        self.epoch.blocks.check()

    def step(self) -> None:
        """Send all plans that may be in flight, then settle the oldest."""
        while self.send() is not None:
            pass
        assert self.in_flight, "requests are alive and nothing can run"
        self.settle()

    def run(self) -> None:
        """Step until every request has ended and every plan is settled."""
        while self.pool.requests or self.in_flight:
            self.step()

    def streamed(self, request: Request) -> list[int]:
        """The tokens that the request's front end was told."""
        pairs = zip(self.outbox.streams, self.outbox.token_ids, strict=True)
        return [token for stream, token in pairs if stream == request.stream]

    def streamed_logprobs(self, request: Request) -> list[RowLogprobs]:
        """The log-probabilities that the request's front end was told."""
        return [
            RowLogprobs(
                np.frombuffer(row.token_ids, "<i4").tolist(), np.frombuffer(row.logprobs, "<f4").tolist(), row.rank
            )
            for row in self.outbox.logprobs
            if row.stream == request.stream
        ]

    def reason(self, request: Request) -> int | str | None:
        """The finish reason or the error code that the front end was told, None while there is none."""
        ends = [event.reason for event in self.outbox.finished if event.stream == request.stream]
        ends += [event.code for event in self.outbox.failed if event.stream == request.stream]
        assert len(ends) <= 1, "a stream ended twice"
        return ends[0] if ends else None
