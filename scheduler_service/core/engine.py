"""The core's event loop: front ends on one side, the executor on the other, the scheduler between them.

Everything runs on one thread, so that no state is locked; whatever may change what can run next ends in `pump`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio

from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.config import SchedulerConfig
from scheduler_service.core.frontends import Frontends
from scheduler_service.core.masks import MaskSource
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.scheduler import Policy, Scheduler
from scheduler_service.core.session import CHANNEL_OPTIONS, ExecutorSession, SessionRefused, limits_of
from scheduler_service.core.settlement import apply_result
from scheduler_service.core.step_plan import StepResult
from scheduler_service.core.waiting_queue import ORDERS
from scheduler_service.ipc import EngineStatus, Load, ModelInfo
from servicekit.digest import model_digest

SWEEP_INTERVAL_S = 0.05
RECONNECT_S = 0.2

log = logging.getLogger(__name__)


class Engine:
    """Owns the pool and keeps plans in flight while an executor is there."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self.pool = RequestPool(ORDERS[config.queue_order], config.max_waiting)
        self._scheduler = Scheduler(self.pool, Policy(config.max_inflight_steps, config.max_decode_stall_ms / 1000))
        self._frontends = Frontends(self)
        self._masks = MaskSource(self.pool, Path(config.model), on_change=self.pump)
        self._session: ExecutorSession | None = None
        self._num_sessions = 0  # opened so far; each executor process counts epochs of its own
        self._model: ModelInfo | None = None
        self._started_at = time.monotonic()
        self._executor_lost_at = self._started_at
        self._last_reason = ""

    async def run(self, socket_path: str, on_listening: Callable[[], None]) -> None:
        """Serve until cancelled; `on_listening` is called once front ends can connect."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._frontends.serve(socket_path, on_listening))
            tasks.create_task(self._keep_session())
            tasks.create_task(self._masks.run())
            tasks.create_task(self._sweep())

    @property
    def status(self) -> EngineStatus:
        """What front ends are told of the executor."""
        return EngineStatus(self._session is not None, self._num_sessions, self._config.queue_order, self._model)

    @property
    def max_total_tokens(self) -> int:
        """Most tokens of one sequence on the last executor."""
        assert self._model is not None
        return min(self._model.max_model_len, self._model.max_cache_tokens)

    def load(self) -> Load:
        """A snapshot of the pool."""
        return self.pool.load(time.monotonic() - self._started_at)

    def pump(self) -> None:
        """Send plans while any can be sent, then tell the front ends what is new."""
        self._masks.work()
        while self._session is not None and (plan := self._scheduler.schedule(time.monotonic())) is not None:
            self._session.send(plan)
        self._frontends.flush()

    def drop_all_of(self, outbox: Outbox) -> None:
        """End the requests of a front end that is gone."""
        self.pool.drop_all_of(outbox)
        self.pump()

    def _on_result(self, result: StepResult) -> None:
        apply_result(self.pool, result)
        self.pump()

    async def _keep_session(self) -> None:
        """Open one epoch after another, for as long as the core lives."""
        digest = model_digest(Path(self._config.model))
        async with grpc.aio.insecure_channel(self._config.executor, options=CHANNEL_OPTIONS) as channel:
            while True:
                session = ExecutorSession(channel)
                try:
                    weights_digest = self._model.weights_digest if self._model else ""
                    self._begin(session, await session.open(digest, weights_digest))
                    await session.run(self._on_result)
                except* (grpc.aio.AioRpcError, SessionRefused) as group:
                    self._tell_why(group.exceptions[0])
                finally:
                    self._end(session)
                await asyncio.sleep(RECONNECT_S)

    def _begin(self, session: ExecutorSession, info: pb.ExecutorInfo) -> None:
        limits = limits_of(info)
        self._model = ModelInfo(
            architecture=info.architecture,
            dtype=info.dtype,
            device=info.device,
            weights_digest=info.weights_digest,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            max_cache_tokens=info.num_blocks * info.block_size,
        )
        log.info("epoch %d on %s: %s", session.epoch, info.device, limits)
        self._masks.begin(info.vocab_size)
        self._session, self._last_reason = session, ""
        self._num_sessions += 1
        epoch = self.pool.begin_epoch(limits)
        self._frontends.kv_events.begin_epoch(epoch.blocks.prefix_cache)
        self._frontends.broadcast_status()
        self.pump()

    def _end(self, session: ExecutorSession) -> None:
        session.close()
        if self._session is not session:
            return
        self._session, self._executor_lost_at = None, time.monotonic()
        self.pool.end_epoch()
        self._frontends.kv_events.end_epoch()
        log.warning("epoch %d is over; %d requests wait for an executor", session.epoch, len(self.pool.waiting))
        self._frontends.broadcast_status()

    def _tell_why(self, error: Exception) -> None:
        """Log why there is no session, once for each reason."""
        if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE:
            reason = f"waiting for an executor at {self._config.executor}"
        else:
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
            reason = f"no executor session: {details}"
        if reason != self._last_reason:
            log.warning("%s", reason)
            self._last_reason = reason

    async def _sweep(self) -> None:
        """Enforce deadlines, and the pause that a request may wait for an executor."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            now = time.monotonic()
            self.pool.expire(now)
            self._masks.check(now)
            if self._session is None and now - self._executor_lost_at > self._config.max_pause_s:
                limit = self._config.max_pause_s
                self.pool.fail_older_than(now - limit, f"no executor for {limit:g} seconds")
            self.pump()
