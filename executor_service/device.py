"""The device behind the sessions: what is queued for it, and the two threads that launch and collect.

A session is one stream, from its first message to its end; the device knows of it only where results go, and whether
anybody still wants them.
"""

import asyncio
import collections
import dataclasses
import logging
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, Protocol

import grpc

from executor_service.plan import InvalidPlan, Plan
from executor_service.runner.runner import Pending, Runner, RunnerInfo, StepOutput
from executor_service.watchdog import WIPE_TIMEOUT_S, Watchdog, Watched
from servicekit.fault_points import reach

log = logging.getLogger(__name__)


class SessionError(Exception):
    """Ends a session with a status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclasses.dataclass(frozen=True)
class Wiped:
    """The device's answer to an opening: what ran before is over and every slot is empty."""


# What reaches a stream's writer. None: the client closed its side.
Event = Wiped | StepOutput | SessionError | None


class Session:
    """One stream, from its first message to its end. `ended` alone is also read and written by the device's threads."""

    def __init__(self) -> None:
        self.epoch: int | None = None  # None until it was opened
        self.is_wiped = False  # whether plans may come
        self.ended = False  # its queued plans are dropped
        self.next_step_id = 1
        self.last_step_ids: collections.deque[int] = collections.deque()  # of each plan in flight
        self.events: asyncio.Queue[Event] = asyncio.Queue()  # holds results of MAX_INFLIGHT_PLANS plans at most

    def end(self, error: SessionError | None) -> None:
        """Drop what is queued and let the writer end the stream."""
        self.ended = True
        self.events.put_nowait(error)


class Followers(Protocol):
    """The other ranks, which must run what this one runs, in the same order."""

    def send(self, message: bytes) -> None:
        """Hand them a RunSessionRequest with a plan, or nothing, which stands for the wiping of slots."""
        ...


@dataclasses.dataclass(frozen=True)
class _Job:
    session: Session
    plan: Plan | None  # None: the wiping of slots
    message: bytes  # for the followers
    watched: Watched


class Device:
    """Runs jobs in order: plans, and the wiping of slots between epochs.

    One thread launches them, and a second waits for what they bring, so that a device that works by itself is given
    its next job before the last one has ended. What is launched is run to its end, whoever still wants it: followers
    that were told to would otherwise wait for this rank in a collective.
    """

    def __init__(self, runner: Runner, thread: ThreadPoolExecutor, followers: Followers | None = None) -> None:
        """`thread`: one worker, the one that built the runner (see rank.py)."""
        self._runner = runner
        self._followers = followers
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._launched: queue.SimpleQueue[tuple[_Job, Pending | Exception] | None] = queue.SimpleQueue()
        self._watchdog = Watchdog()
        self.failed = asyncio.Event()  # an exception left the device in an unknown state: it runs nothing more
        self._has_failed = False  # the same for both threads
        self._num_handed_over = self._num_collected = 0  # each is counted by one of the threads
        self._launching = thread.submit(self._launch_jobs)
        self._collecting = threading.Thread(target=self._collect_outputs, name="device results")
        self._collecting.start()

    @property
    def info(self) -> RunnerInfo:
        """The runner's."""
        return self._runner.info

    def wipe(self, session: Session) -> None:
        """Queue the emptying of all slots; the session is told when it is done, unless it ended before."""
        self._queue(_Job(session, None, b"", Watched(None, WIPE_TIMEOUT_S)))

    def submit(self, session: Session, plan: Plan, message: bytes, timeout_s: float) -> None:
        """Queue a plan, and the request that it came in. Results go to the session; once that ended, none starts.

        timeout_s: what the device may take over it before it counts as hanging; 0: as long as it needs.
        """
        self._queue(_Job(session, plan, message, Watched(plan.step_id, timeout_s)))

    async def watch(self) -> NoReturn:
        """End the process when the device hangs."""
        await self._watchdog.watch()

    def close(self) -> None:
        """Wait for the running job, of a session that ended, and end both threads."""
        self._jobs.put(None)
        self._launching.result()
        self._collecting.join()

    def _queue(self, job: _Job) -> None:
        self._watchdog.expect(job.watched)
        self._jobs.put(job)

    def _launch_jobs(self) -> None:
        while (job := self._jobs.get()) is not None and not self._has_failed:
            session = job.session
            if session.ended:
                job.watched.is_over = True
                continue
            try:
                self._launch(job)
            except Exception as error:
                session.ended = True  # here, since the next job may be this session's too
                self._has_failed |= not isinstance(error, InvalidPlan)
                self._hand_over(job, error)
        self._launched.put(None)

    def _launch(self, job: _Job) -> None:
        if job.plan is not None:
            _reach_beginning(job.plan)
        if self._followers:
            self._followers.send(job.message)
        if job.plan is None:
            self._runner.reset()
            job.watched.is_over = True
            self._post(job.session, Wiped())
            return
        pending = None
        for pending in self._runner.execute(job.plan):
            if isinstance(pending, StepOutput) and self._num_collected == self._num_handed_over:
                self._answer(job, pending)  # there already, and nothing before it under way: no need for a thread
            else:
                self._hand_over(job, pending)
        assert pending, "a plan without a result"
        assert _is_last(pending, job.plan), "the last step lacks its result"

    def _hand_over(self, job: _Job, pending: Pending | Exception) -> None:
        self._num_handed_over += 1
        self._launched.put((job, pending))

    def _collect_outputs(self) -> None:
        """Post outputs in order; what a launch raised comes after the outputs of the launches before it."""
        while (launched := self._launched.get()) is not None:
            job, pending = launched
            try:
                if isinstance(pending, Exception):
                    raise pending
                self._answer(job, pending.wait())
            except InvalidPlan as error:
                job.watched.is_over = True
                self._post(job.session, SessionError(grpc.StatusCode.INVALID_ARGUMENT, str(error)))
            except Exception as error:
                self._fail(job.session, error)
            self._num_collected += 1

    def _answer(self, job: _Job, output: StepOutput) -> None:
        assert job.plan
        reach("executor.step_done", output.step_id)
        job.watched.is_over = _is_last(output, job.plan)
        self._post(job.session, output)

    def _fail(self, session: Session, error: Exception) -> None:
        log.error("the device failed in epoch %s", session.epoch, exc_info=error)
        self._has_failed = session.ended = True
        self._post(session, SessionError(grpc.StatusCode.INTERNAL, f"the device failed: {error!r}"))
        self._loop.call_soon_threadsafe(self.failed.set)

    def _post(self, session: Session, event: Event) -> None:
        self._loop.call_soon_threadsafe(session.events.put_nowait, event)


def last_step_id(plan: Plan) -> int:
    """Of the steps that the plan stands for."""
    return plan.step_id + max(plan.iterations, 1) - 1


def _is_last(pending: Pending, plan: Plan) -> bool:
    """Of the outputs of the plan."""
    return pending.step_id == last_step_id(plan) and not pending.partial


def _reach_beginning(plan: Plan) -> None:
    reach("executor.step_begun", plan.step_id)
    for sequence in plan.new_sequences:
        reach("executor.sequence", sequence.sampling.seed)
