"""What every rank but the first does: run the plans that rank 0 runs, and drop what comes out."""

import logging
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from executor_service.plan import InvalidPlan, decode_plan
from executor_service.runner.runner import Pending, Runner, StepOutput
from protos.duet.executor.v1 import executor_pb2 as pb
from servicekit.fault_points import reach

log = logging.getLogger(__name__)

_Launched = queue.SimpleQueue[Pending | None]


def follow(runner: Runner, device_thread: ThreadPoolExecutor, receive: Callable[[], bytes | None]) -> None:
    """Run what `receive` returns (see Followers.send) until that is None.

    device_thread: one worker, the one that built the runner.
    Raises: what the runner or `receive` raises; the device thread may then still be stuck in a plan.
    """
    launched: _Launched = queue.SimpleQueue()
    launching = device_thread.submit(_launch_all, runner, receive, launched)
    while (pending := launched.get()) is not None:
        pending.wait()
    launching.result()


def _launch_all(runner: Runner, receive: Callable[[], bytes | None], launched: _Launched) -> None:
    try:
        while (message := receive()) is not None:
            _launch(runner, message, launched)
    finally:
        launched.put(None)


def _launch(runner: Runner, message: bytes, launched: _Launched) -> None:
    if not message:
        runner.reset()
        return
    plan = decode_plan(pb.RunSessionRequest.FromString(message).plan, runner.info.limits)
    reach("follower.plan_received", plan.step_id)
    try:
        for pending in runner.execute(plan):
            if not isinstance(pending, StepOutput):
                launched.put(pending)
    except InvalidPlan as error:  # on every rank alike, and before anything has changed
        log.info("step %d is refused: %s", plan.step_id, error)
