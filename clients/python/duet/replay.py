"""Replays a recorded session on an executor.

A plan that was sent after a result had come is sent after the same step's result has come now. The time that a plan
may take on the device is left out: it was measured on another device.
"""

import dataclasses
import queue
import time
from collections.abc import Callable
from typing import Any

import grpc

from duet.errors import from_rpc
from duet.recorded_session import Outcome, Progress, RecordedSession, progress_of, step_ids
from duet.recording import MAX_MESSAGE_BYTES
from protos.duet.executor.v1 import executor_pb2 as pb
from protos.duet.executor.v1.executor_pb2_grpc import ExecutorServiceStub

_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
# What may not be less than it was, and the flag that sets it.
_LIMITS = {
    "max_model_len": " (--max-model-len)",
    "num_slots": " (--max-num-seqs)",
    "max_tokens_per_step": " (--max-tokens-per-step)",
    "max_inflight_plans": "",
}


class ReplayRefused(Exception):
    """The executor is in use, or cannot run what was recorded."""


class ReplayFailed(Exception):
    """The executor failed at what was recorded."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """What came of a recorded session's plans on another executor."""

    info: pb.ExecutorInfo
    outcome: Outcome
    wall_s: float  # from the first plan to the last result


def replay(
    session: RecordedSession,
    address: str,
    *,
    at_recorded_pace: bool = False,
    on_progress: Callable[[Progress], object] = lambda progress: None,
) -> Replay:
    """Run the session's plans in an epoch of their own on the executor at `address` (host:port).

    `at_recorded_pace`: no plan is sent sooner after the first one than it was. `on_progress` hears of every result.
    Raises: ReplayRefused, ReplayFailed; DuetError where there is no executor.
    """
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        return _Run(session, channel, address, on_progress).run(at_recorded_pace)


class _Run:
    """One call, from the handshake to its orderly end."""

    def __init__(
        self,
        session: RecordedSession,
        channel: grpc.Channel,
        address: str,
        on_progress: Callable[[Progress], object],
    ) -> None:
        self._session = session
        self._address = address
        self._on_progress = on_progress
        self._outcome = Outcome()
        self._requests: queue.SimpleQueue[pb.RunSessionRequest | None] = queue.SimpleQueue()
        self._call: Any = ExecutorServiceStub(channel).RunSession(iter(self._requests.get, None))

    def run(self, at_recorded_pace: bool) -> Replay:
        is_open = False
        try:
            info, epoch = self._open()
            is_open = True
            wall_s = self._run_plans(epoch, at_recorded_pace)
            self._requests.put(None)
            for _ in self._call:  # until the executor has ended the session, too
                raise ReplayFailed("the executor sent more results than there were steps")
        except grpc.RpcError as error:
            failure = from_rpc(error, self._address)
            if not is_open:
                raise failure from None
            raise self._failed(failure.message) from None
        except StopIteration:
            raise self._failed("the executor ended the session") from None
        finally:
            self._requests.put(None)
            self._call.cancel()
        return Replay(info, self._outcome, wall_s)

    def _failed(self, reason: str) -> ReplayFailed:
        step_id, _ = self._outcome.progress
        return ReplayFailed(f"session {self._session.number}, after step {step_id}: {reason}")

    def _open(self) -> tuple[pb.ExecutorInfo, int]:
        """Returns the executor's description, and the epoch that it opened."""
        info = next(self._call).info
        _check(self._session, info)
        opening = pb.OpenSession(
            epoch=info.last_epoch + 1,
            protocol_version=min(info.protocol_version, self._session.opening.protocol_version),
            model_digest=info.model_digest,
        )
        self._requests.put(pb.RunSessionRequest(open=opening))
        return info, next(self._call).opened.epoch

    def _run_plans(self, epoch: int, at_recorded_pace: bool) -> float:
        """Returns the seconds from the first plan to the last result."""
        start, recorded_start_ns, last_step_id = 0.0, 0, 0
        for time_ns, message in self._session.messages():
            if isinstance(message, pb.StepResult):
                self._wait_for(progress_of(message))
                continue
            if not last_step_id:
                start, recorded_start_ns = time.monotonic(), time_ns
            elif at_recorded_pace:
                time.sleep(max(0.0, start + (time_ns - recorded_start_ns) / 1e9 - time.monotonic()))
            message.epoch, message.timeout_ms = epoch, 0
            self._requests.put(pb.RunSessionRequest(plan=message))
            last_step_id = step_ids(message)[-1]
        self._wait_for((last_step_id, True))
        return time.monotonic() - start

    def _wait_for(self, progress: Progress) -> None:
        while self._outcome.progress < progress:
            self._outcome.add(next(self._call).result)
            self._on_progress(self._outcome.progress)


def _check(session: RecordedSession, info: pb.ExecutorInfo) -> None:
    """Raises: ReplayRefused, where the plans were not made for such an executor, or a scheduler has it."""
    recorded = session.info
    if info.session_alive:
        raise ReplayRefused("a scheduler has the executor: a replay needs one of its own")
    if info.model_digest != recorded.model_digest:
        raise ReplayRefused(f"the executor serves another model ({info.architecture}) than was recorded")
    if info.weights_digest != recorded.weights_digest:
        raise ReplayRefused("the executor's weights are not those that were recorded")
    version = session.opening.protocol_version
    if abs(info.protocol_version - version) > 1:
        raise ReplayRefused(f"the executor speaks protocol version {info.protocol_version}, recorded was {version}")
    if info.block_size != recorded.block_size:
        raise ReplayRefused(f"the executor's block size is {info.block_size}, not {recorded.block_size} (--block-size)")
    for name, flag in _LIMITS.items():
        limit, needed = getattr(info, name), getattr(recorded, name)
        if limit < needed:
            raise ReplayRefused(f"the executor's {name} is {limit}, {needed} are needed{flag}")
    # How many there are may depend on the free memory of the moment, so only those in use count.
    if info.num_blocks < (needed := session.num_blocks()):
        raise ReplayRefused(f"the executor has {info.num_blocks} KV blocks, {needed} are needed (--num-blocks)")
