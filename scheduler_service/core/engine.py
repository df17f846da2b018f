"""The core's event loop: front ends on one side, the executor on the other, the scheduler between them.

Everything runs on one thread, so that no state is locked; whatever may change what can run next ends in `pump`.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio

from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.config import SchedulerConfig
from scheduler_service.core.drain import Drain
from scheduler_service.core.frontends import Frontends
from scheduler_service.core.idle_check import IdleCheck
from scheduler_service.core.load import load_of
from scheduler_service.core.masks import MaskSource
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.resumption import expire, leave_all
from scheduler_service.core.scheduler import Policy, Scheduler
from scheduler_service.core.session import (
    CHANNEL_OPTIONS,
    ExecutorHangs,
    ExecutorSession,
    SessionEnded,
    SessionRefused,
    limits_of,
)
from scheduler_service.core.settlement import apply_result
from scheduler_service.core.step_plan import StepResult
from scheduler_service.core.waiting_queue import ORDERS
from scheduler_service.ipc import EngineStatus, Load, ModelInfo
from servicekit.digest import model_digest
from servicekit.fault_points import reach

SWEEP_INTERVAL_S = 0.05
RECONNECT_S = 0.2

log = logging.getLogger(__name__)


class Engine:
    """Owns the pool and keeps plans in flight while an executor is there."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self.pool = RequestPool(ORDERS[config.queue_order], config.max_waiting)
        policy = Policy(config.max_inflight_steps, config.max_decode_stall_ms / 1000, config.step_timeout_s)
        self._scheduler = Scheduler(self.pool, policy)
        self.drain = Drain(self.pool)
        self._idle_check = IdleCheck(self.pool)
        self._frontends = Frontends(self)
        self._masks = MaskSource(self.pool, Path(config.model), on_change=self.pump)
        self._session: ExecutorSession | None = None
        self._num_sessions = 0  # opened so far; each executor process counts epochs of its own
        self._model: ModelInfo | None = None
        self._started_at = time.monotonic()
        self._executor_lost_at = self._started_at
        self._last_reasons: set[str] = set()  # why there was no session since the last one

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
        return EngineStatus(
            ready=self._session is not None,
            epoch=self._num_sessions,
            queue_order=self._config.queue_order,
            model=self._model,
            draining=self.pool.is_draining,
        )

    def load(self) -> Load:
        """A snapshot of the pool."""
        return load_of(self.pool, time.monotonic() - self._started_at)

    def pump(self) -> None:
        """Send plans while any can be sent, then tell the front ends what is new."""
        self._masks.work()
        while self._session is not None and (plan := self._scheduler.schedule(time.monotonic())) is not None:
            self._session.send(plan)
        self._frontends.flush()
        self.pool.unheard.take()
        self.drain.answer()

    def leave_all(self, outbox: Outbox) -> None:
        """A front end is gone: its requests end, but for those that outlive their clients."""
        leave_all(self.pool, outbox)
        self.pump()

    def _on_result(self, result: StepResult) -> None:
        apply_result(self.pool, result)
        reach("core.result_applied")
        self.pump()

    async def _keep_session(self) -> None:
        """Open one epoch after another, on the first executor that serves, for as long as the core lives."""
        digest = model_digest(Path(self._config.model))
        addresses = self._config.executor.split(",")
        async with contextlib.AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS))
                for address in addresses
            ]
            for channel, address in itertools.cycle(zip(channels, addresses, strict=True)):
                await self._hold_session(channel, digest, address)
                if address == addresses[-1]:
                    await asyncio.sleep(RECONNECT_S)

    async def _hold_session(self, channel: grpc.aio.Channel, digest: str, address: str) -> None:
        """Open an epoch and stay in it until its end."""
        session, in_order = ExecutorSession(channel), False
        try:
            weights_digest = self._model.weights_digest if self._model else ""
            self._begin(session, await session.open(digest, weights_digest))
            await session.run(self._on_result)
        except* (grpc.aio.AioRpcError, SessionRefused, ExecutorHangs, TimeoutError) as group:
            error = group.exceptions[0]
            in_order = isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.ABORTED  # fenced
            self._tell_why(error, address)
        except* SessionEnded as group:
            in_order = True
            self._tell_why(group.exceptions[0], address)
        finally:
            self._end(session, in_order=in_order)

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
        self._session = session
        self._last_reasons.clear()
        self._num_sessions += 1
        epoch = self.pool.begin_epoch(limits)
        reach("core.epoch_begun")
        self._frontends.kv_events.begin_epoch(epoch.blocks.prefix_cache)
        self._frontends.broadcast_status()
        self.pump()

    def _end(self, session: ExecutorSession, *, in_order: bool) -> None:
        session.close()
        if self._session is not session:
            return
        self._session, self._executor_lost_at = None, time.monotonic()
        self.pool.end_epoch(in_order=in_order)
        self._frontends.kv_events.end_epoch()
        log.warning("epoch %d is over; %d requests wait for an executor", session.epoch, self.pool.num_waiting)
        self._frontends.broadcast_status()
        self.pump()

    def _tell_why(self, error: Exception, address: str) -> None:
        """Log why there is no session with an executor, once for each reason."""
        if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE:
            reason = f"waiting for an executor at {address}"
        else:
            details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error) or repr(error)
            reason = f"no session with the executor at {address}: {details}"
        if reason not in self._last_reasons:
            log.warning("%s", reason)
            self._last_reasons.add(reason)

    async def _sweep(self) -> None:
        """Enforce deadlines, and the pause that a request may wait for an executor; look after all that may hang."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            now = time.monotonic()
            self.pool.expire(now)
            expire(self.pool, now)
            self.drain.enforce(now)
            self._idle_check.work(now)
            if self._session is not None and self.pool.epoch is not None and self.pool.epoch.is_overdue(now):
                self._session.give_up()
            self._masks.check(now)
            if self._session is None and now - self._executor_lost_at > self._config.max_pause_s:
                limit = self._config.max_pause_s
                self.pool.fail_older_than(now - limit, f"no executor for {limit:g} seconds")
            self.pump()
