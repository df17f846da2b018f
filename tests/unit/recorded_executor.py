"""An executor that answers plans as it is told, and a file of what a scheduler and such an executor said."""

import itertools
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status

from duet.recording import Kind, RecordingWriter
from protos.duet.executor.v1 import executor_pb2 as pb
from protos.duet.executor.v1.executor_pb2_grpc import ExecutorServiceServicer, add_ExecutorServiceServicer_to_server

M = TypeVar("M", bound=Message)

INFO = pb.ExecutorInfo(
    boot_id="boot",
    protocol_version=3,
    architecture="LlamaForCausalLM",
    model_digest="model",
    weights_digest="weights",
    dtype="float32",
    device="a device",
    vocab_size=1000,
    max_model_len=256,
    block_size=16,
    num_blocks=64,
    num_slots=4,
    max_tokens_per_step=128,
    tensor_parallel_size=1,
    max_inflight_plans=8,
)
EPOCH = 5  # of what is recorded


def plan(step_id: int, new_slots: Sequence[int] = (), **fields: Any) -> pb.StepPlan:
    """A plan of the recording's epoch, in which these slots get sequences."""
    sequences = [
        pb.NewSequence(slot=slot, token_ids=column([7]), num_prompt_tokens=1, block_ids=column([slot]))
        for slot in new_slots
    ]
    return pb.StepPlan(epoch=EPOCH, step_id=step_id, new_sequences=sequences, timeout_ms=1000, **fields)


def result(step_id: int, samples: dict[int, int], reasons: Sequence[int] | None = None, **fields: Any) -> pb.StepResult:
    """What a step sampled, token by slot, in two milliseconds."""
    return pb.StepResult(
        epoch=EPOCH,
        step_id=step_id,
        slots=column(samples),
        token_ids=column(samples.values()),
        finish_reasons=column(reasons or [0] * len(samples)),
        device_time_ns=2_000_000,
        **fields,
    )


def column(values: Iterable[int]) -> bytes:
    return np.array(list(values), dtype="<i4").tobytes()


def changed(message: M, **fields: Any) -> M:
    """A copy with these fields replaced."""
    return type(message)(**{**{field.name: value for field, value in message.ListFields()}, **fields})


# Two sequences, of which the first ends; its slot is given to a third one. The second plan is sent ahead, the third
# one when the first step's result has come.
SESSION = [
    plan(1, new_slots=[0, 1]),
    plan(2),
    result(1, {0: 10, 1: 20}),
    plan(3, new_slots=[0]),
    result(2, {0: 11, 1: 21}, reasons=[2, 0]),
    result(3, {0: 30, 1: 22}),
]
ANSWERS = [message for message in SESSION if isinstance(message, pb.StepResult)]


def write_session(
    path: Path, messages: Sequence[pb.StepPlan | pb.StepResult] = SESSION, *, info: pb.ExecutorInfo = INFO, end: int = 0
) -> Path:
    """Append a session to the recording; returns its path."""
    with RecordingWriter(path) as writer:
        number = writer.begin_session()
        opening = pb.OpenSession(epoch=EPOCH, protocol_version=3, model_digest=info.model_digest)
        for message in (info, opening, pb.SessionOpened(epoch=EPOCH), *messages):
            write_message(writer, number, message)
        writer.write(Kind.END, number, Status(code=end, message="the end").SerializeToString())
    return path


def write_message(writer: RecordingWriter, session: int, message: Message) -> None:
    match message:
        case pb.ExecutorInfo():
            whole = pb.RunSessionResponse(info=message)
        case pb.SessionOpened():
            whole = pb.RunSessionResponse(opened=message)
        case pb.StepResult():
            whole = pb.RunSessionResponse(result=message)
        case pb.OpenSession():
            whole = pb.RunSessionRequest(open=message)
        case _:
            assert isinstance(message, pb.StepPlan)
            whole = pb.RunSessionRequest(plan=message)
    kind = Kind.REQUEST if isinstance(whole, pb.RunSessionRequest) else Kind.RESPONSE
    writer.write(kind, session, whole.SerializeToString())


class CannedExecutor(ExecutorServiceServicer):
    """Gives each step its answers, all parts of them, and fails at the first step that has none."""

    def __init__(self, answers: Iterable[pb.StepResult] = ANSWERS, info: pb.ExecutorInfo = INFO) -> None:
        self.answers = list(answers)
        self.info = info
        self.openings: list[pb.OpenSession] = []
        self.plans: list[pb.StepPlan] = []
        self.num_answered_before: list[int] = []  # for each plan, the steps whose results had been sent when it came
        self.answer_delay_s = 0.0
        self.num_plans_before: dict[int, int] = {}  # index of an answer -> plans that must have come before it is given
        self._num_answered = 0
        self._is_alive = False  # the session before
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_ExecutorServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def RunSession(
        self, request_iterator: Iterator[pb.RunSessionRequest], context: Any
    ) -> Iterator[pb.RunSessionResponse]:
        epoch, is_alive = len(self.openings) + 1, self._is_alive or self.info.session_alive
        yield pb.RunSessionResponse(info=changed(self.info, last_epoch=epoch - 1, session_alive=is_alive))
        if (first := next(request_iterator, None)) is None:
            return
        self.openings.append(first.open)
        yield pb.RunSessionResponse(opened=pb.SessionOpened(epoch=epoch))
        self._num_answered, self._is_alive = 0, True
        try:
            yield from self._answer(request_iterator, context, epoch)
            time.sleep(0.05)  # so that who does not wait for the end comes too soon
        finally:
            self._is_alive = False

    def _answer(
        self, requests: Iterator[pb.RunSessionRequest], context: Any, epoch: int
    ) -> Iterator[pb.RunSessionResponse]:
        plans: queue.SimpleQueue[pb.StepPlan | None] = queue.SimpleQueue()
        reader = threading.Thread(target=self._take_plans, args=(requests, plans), daemon=True)
        reader.start()
        index = itertools.count()
        while (plan := plans.get()) is not None:
            for step_id in range(plan.step_id, plan.step_id + max(plan.iterations, 1)):
                answers = [answer for answer in self.answers if answer.step_id == step_id]
                if not answers:
                    context.abort(grpc.StatusCode.INTERNAL, "the device failed")
                for answer in answers:
                    time.sleep(self.answer_delay_s)
                    num_plans = self.num_plans_before.get(next(index), 0)
                    while len(self.plans) < num_plans and reader.is_alive():
                        time.sleep(0.01)
                    self._num_answered += not answer.partial
                    yield pb.RunSessionResponse(result=changed(answer, epoch=epoch))

    def _take_plans(
        self, requests: Iterator[pb.RunSessionRequest], plans: "queue.SimpleQueue[pb.StepPlan | None]"
    ) -> None:
        try:
            for request in requests:
                self.num_answered_before.append(self._num_answered)
                self.plans.append(request.plan)
                plans.put(request.plan)
        except Exception:  # how grpc says that the call has ended
            pass
        plans.put(None)
