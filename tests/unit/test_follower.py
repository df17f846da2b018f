"""The loop of a rank above 0, with a runner that is a script."""

import dataclasses
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from executor_service.distributed.follower import follow
from executor_service.plan import InvalidPlan, Limits, Plan
from executor_service.runner.runner import Pending, RunnerInfo, StepOutput
from protos.duet.executor.v1 import executor_pb2 as pb

LIMITS = Limits(num_slots=4, num_blocks=8, block_size=4, vocab_size=100, max_model_len=32, max_tokens_per_step=16)
NONE = np.zeros(0, dtype=np.int32)


def message(step_id: int, *, iterations: int = 1, join_slots: bytes = b"") -> bytes:
    plan = pb.StepPlan(epoch=1, step_id=step_id, iterations=iterations, join_slots=join_slots)
    return pb.RunSessionRequest(plan=plan).SerializeToString()


@dataclasses.dataclass
class Step:
    """A pending output that writes down where it was waited for."""

    step_id: int
    runner: "ScriptedRunner"
    partial: bool = False

    def wait(self) -> StepOutput:
        self.runner.waited.append((self.step_id, threading.get_ident()))
        if self.step_id == self.runner.lost_step:
            raise RuntimeError("the device was lost")
        return _output(self.step_id)


class ScriptedRunner:
    """Refuses step 7 and fails in step 8; yields odd steps as outputs and even ones as pending."""

    def __init__(self, lost_step: int = 0) -> None:
        self.info = RunnerInfo("Tiny", "model", "weights", "float32", "a script", LIMITS, ())
        self.lost_step = lost_step
        self.ran: list[object] = []
        self.waited: list[tuple[int, int]] = []
        self.threads: set[int] = set()

    def reset(self) -> None:
        self.ran.append("reset")

    def execute(self, plan: Plan) -> Iterator[Pending]:
        self.threads.add(threading.get_ident())
        if plan.step_id == 7:
            raise InvalidPlan("slot 3 is taken")
        if plan.step_id == 8:
            raise RuntimeError("matrix on fire")
        for step_id in range(plan.step_id, plan.step_id + plan.iterations):
            self.ran.append(step_id)
            yield _output(step_id) if step_id % 2 else Step(step_id, self)


def _output(step_id: int) -> StepOutput:
    return StepOutput(step_id, False, NONE, NONE, NONE, [], 0)


def follow_all(runner: ScriptedRunner, *messages: bytes) -> None:
    with ThreadPoolExecutor(1) as thread:
        follow(runner, thread, iter([*messages, None]).__next__)


def test_plans_run_to_their_end_in_order_and_nothing_stands_for_a_reset() -> None:
    runner = ScriptedRunner()
    follow_all(runner, b"", message(1), message(2, iterations=4), b"", message(1))
    assert runner.ran == ["reset", 1, 2, 3, 4, 5, "reset", 1]


def test_what_is_pending_is_waited_for_once_each_in_order_by_another_thread_than_the_runners() -> None:
    runner = ScriptedRunner()
    follow_all(runner, message(1, iterations=6))
    assert [step_id for step_id, _ in runner.waited] == [2, 4, 6]
    waiters = {thread for _, thread in runner.waited}
    assert len(waiters) == 1
    assert not waiters & runner.threads


def test_a_plan_that_the_runner_refuses_changes_nothing() -> None:
    runner = ScriptedRunner()
    follow_all(runner, message(1), message(7), b"", message(1))
    assert runner.ran == [1, "reset", 1]


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (message(8), RuntimeError),
        (message(1, join_slots=b"\4\0\0\0"), InvalidPlan),  # rank 0 has checked it against the same limits
        (b"\xff", Exception),
    ],
)
def test_whatever_else_goes_wrong_is_raised(sent: bytes, error: type[Exception]) -> None:
    runner = ScriptedRunner()
    with pytest.raises(error):
        follow_all(runner, message(1), sent, message(2))
    assert runner.ran == [1]


def test_a_lost_device_is_raised_while_the_next_plan_is_still_awaited() -> None:
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    messages.put(message(2))
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(RuntimeError, match="lost"):
            follow(ScriptedRunner(lost_step=2), thread, messages.get)
        messages.put(None)


def test_the_loss_of_rank_0_is_raised() -> None:
    def receive() -> bytes | None:
        raise ConnectionResetError

    with ThreadPoolExecutor(1) as thread, pytest.raises(ConnectionResetError):
        follow(ScriptedRunner(), thread, receive)
