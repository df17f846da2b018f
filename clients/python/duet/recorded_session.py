"""The sessions of a recording, and how what they sampled differs from what another executor samples.

Steps, slots and plans are those of executor.proto.
"""

import collections
import dataclasses
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

from google.protobuf.message import DecodeError, Message
from google.rpc.status_pb2 import Status

from duet.recording import InvalidRecording, Kind, Record
from protos.duet.executor.v1 import executor_pb2 as pb

_MESSAGES = {Kind.REQUEST: pb.RunSessionRequest, Kind.RESPONSE: pb.RunSessionResponse}

Progress = tuple[int, bool]  # the last step of which a result came, and whether it was its last one


@dataclasses.dataclass(frozen=True)
class RecordedSession:
    """A session in which plans were sent."""

    number: int  # in its file
    info: pb.ExecutorInfo
    opening: pb.OpenSession
    records: Sequence[Record]  # plans and results, in order
    end: Status | None  # None: the recorder ended first

    def messages(self) -> Iterator[tuple[int, pb.StepPlan | pb.StepResult]]:
        """Plans and results in order, each with its time in nanoseconds."""
        for record in self.records:
            message = _parse(record)
            assert isinstance(message, pb.StepPlan | pb.StepResult)
            yield record.time_ns, message

    def plans(self) -> Iterator[pb.StepPlan]:
        """The plans in order."""
        return (message for _, message in self.messages() if isinstance(message, pb.StepPlan))

    def results(self) -> Iterator[pb.StepResult]:
        """The results in order."""
        return (message for _, message in self.messages() if isinstance(message, pb.StepResult))

    def num_steps(self) -> int:
        """How many steps the plans stand for."""
        return sum(len(step_ids(plan)) for plan in self.plans())

    def wall_s(self) -> float | None:
        """Seconds from the first plan to the last result; None where there is no result."""
        plans = [record.time_ns for record in self.records if record.kind is Kind.REQUEST]
        results = [record.time_ns for record in self.records if record.kind is Kind.RESPONSE]
        return (results[-1] - plans[0]) / 1e9 if results else None

    def num_blocks(self) -> int:
        """How many KV blocks an executor must have, so that every block of the plans is one of its own."""
        columns = (
            column
            for plan in self.plans()
            for column in (plan.append_blocks, *(sequence.block_ids for sequence in plan.new_sequences))
        )
        return 1 + max((max(integers(column), default=-1) for column in columns), default=-1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a slot sampled in a step."""

    token_id: int | None  # None: the step failed for this slot
    finish_reason: int  # as in StepResult


@dataclasses.dataclass
class Step:
    """What is known of a step's result."""

    samples: dict[int, Sample] = dataclasses.field(default_factory=dict)  # by slot
    device_time_ns: int = 0
    is_whole: bool = False  # all its parts came


class Outcome:
    """What came of a session's plans."""

    def __init__(self, results: Iterable[pb.StepResult] = ()) -> None:
        self.steps: dict[int, Step] = collections.defaultdict(Step)  # by id; those of which a result came
        self.progress: Progress = (0, True)
        for result in results:
            self.add(result)

    def add(self, result: pb.StepResult) -> None:
        """Take the next result."""
        step = self.steps[result.step_id]
        columns = map(integers, (result.slots, result.token_ids, result.finish_reasons))
        for slot, token_id, finish_reason in zip(*columns, strict=True):
            step.samples[slot] = Sample(token_id, finish_reason)
        for error in result.slot_errors:
            step.samples[error.slot] = Sample(None, 0)
        step.device_time_ns += result.device_time_ns
        step.is_whole = not result.partial
        self.progress = progress_of(result)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A slot that sampled something else in a step; None: nothing."""

    step_id: int
    slot: int
    recorded: Sample | None
    replayed: Sample | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two outcomes of the same plans. Only steps of which a result was recorded count."""

    num_steps: int
    num_tokens: int  # that were recorded
    num_sequences: int  # that took a slot; a preempted one takes one again
    num_differences: int
    num_different_sequences: int  # since after one difference a sequence goes another way
    first_difference: Difference | None


def split_sessions(records: Iterable[Record]) -> list[RecordedSession]:
    """The sessions in which plans were sent, in the order of their beginnings. Raises: InvalidRecording."""
    of_session: dict[int, list[Record]] = collections.defaultdict(list)
    for record in records:
        of_session[record.session].append(record)
    try:
        sessions = [_session(number, records) for number, records in sorted(of_session.items())]
    except DecodeError as error:
        raise InvalidRecording("a message of it does not parse") from error
    return [session for session in sessions if session]


def compare(plans: Iterable[pb.StepPlan], recorded: Mapping[int, Step], replayed: Mapping[int, Step]) -> Comparison:
    """Compare what the steps of `plans` sampled."""
    num_steps = num_tokens = num_sequences = num_differences = 0
    holders: dict[int, int] = {}  # slot -> number of the sequence
    different: set[int] = set()
    first: Difference | None = None
    for plan in plans:
        for sequence in plan.new_sequences:
            holders[sequence.slot] = num_sequences
            num_sequences += 1
        for step_id in step_ids(plan):
            if step_id not in recorded:
                continue
            num_steps += 1
            num_tokens += sum(sample.token_id is not None for sample in recorded[step_id].samples.values())
            for difference in _differences(step_id, recorded[step_id], replayed.get(step_id, Step())):
                num_differences += 1
                different.add(holders[difference.slot])
                first = first or difference
    return Comparison(num_steps, num_tokens, num_sequences, num_differences, len(different), first)


def step_ids(plan: pb.StepPlan) -> range:
    """The steps that a plan stands for."""
    return range(plan.step_id, plan.step_id + max(plan.iterations, 1))


def progress_of(result: pb.StepResult) -> Progress:
    """How far a session has come with this result."""
    return result.step_id, not result.partial


def integers(column: bytes) -> tuple[int, ...]:
    """The values of a column of executor.proto; of one that is cut within a value, those before."""
    return struct.unpack_from(f"<{len(column) // 4}i", column)


def _session(number: int, records: Iterable[Record]) -> RecordedSession | None:
    """None where no plan was sent. Raises: DecodeError."""
    info, opening = pb.ExecutorInfo(), pb.OpenSession()
    kept: list[Record] = []
    end: Status | None = None
    has_plans = False
    for record in records:
        match message := _parse(record):
            case pb.ExecutorInfo():
                info = message
            case pb.OpenSession():
                opening = message
            case pb.StepPlan() | pb.StepResult():
                kept.append(record)
                has_plans |= isinstance(message, pb.StepPlan)
            case Status():
                end = message
    return RecordedSession(number, info, opening, kept, end) if has_plans else None


def _parse(record: Record) -> Message | None:
    """The status, or the one message that a request or a response holds."""
    if record.kind is Kind.END:
        return Status.FromString(record.payload)
    message = _MESSAGES[record.kind].FromString(record.payload)
    name = message.WhichOneof("message")
    return getattr(message, name) if name else None


def _differences(step_id: int, recorded: Step, replayed: Step) -> Iterator[Difference]:
    """A slot that is missing differs only where the recorded step is whole."""
    slots = recorded.samples.keys() | replayed.samples.keys() if recorded.is_whole else recorded.samples.keys()
    for slot in sorted(slots):
        samples = recorded.samples.get(slot), replayed.samples.get(slot)
        if samples[0] != samples[1]:
            yield Difference(step_id, slot, *samples)
