"""What `duet replay` tells of a session."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from google.rpc import code_pb2
from google.rpc.status_pb2 import Status

from duet.bench.metrics import percentile
from duet.recorded_session import Comparison, Outcome, RecordedSession, Sample, Step, compare
from duet.replay import Replay
from protos.duet.executor.v1 import executor_pb2 as pb

_FINISH_REASONS = {0: "", 1: ", a stop token", 2: ", the last by length"}  # as in StepResult


@dataclasses.dataclass(frozen=True)
class Times:
    """How long a session's plans took; None where no result tells."""

    step_p50_ms: float | None  # on the device, of the steps whose result was recorded
    step_p99_ms: float | None
    wall_s: float | None  # from the first plan to the last result

    @classmethod
    def of(cls, steps: Iterable[Step], wall_s: float | None) -> "Times":
        """Of these steps."""
        ordered = sorted(step.device_time_ns / 1e6 for step in steps)
        if not ordered:
            return cls(None, None, wall_s)
        return cls(percentile(ordered, 50), percentile(ordered, 99), wall_s)


@dataclasses.dataclass(frozen=True)
class Report:
    """What is told of a session's replay."""

    session: int
    comparison: Comparison
    num_further_steps: int  # that ran, and of which no result was recorded
    recorded_end: str | None  # where it was a failure
    recorded_on: str
    replayed_on: str
    recorded: Times
    replayed: Times

    @classmethod
    def of(cls, session: RecordedSession, done: Replay) -> "Report":
        """What is to be told of `done`."""
        recorded, replayed = Outcome(session.results()).steps, done.outcome.steps
        comparison = compare(session.plans(), recorded, replayed)
        whole = [step_id for step_id, step in recorded.items() if step.is_whole]
        return cls(
            session=session.number,
            comparison=comparison,
            num_further_steps=session.num_steps() - comparison.num_steps,
            recorded_end=_failure(session.end),
            recorded_on=_place(session.info),
            replayed_on=_place(done.info),
            recorded=Times.of((recorded[step_id] for step_id in whole), session.wall_s()),
            replayed=Times.of((replayed[step_id] for step_id in whole), done.wall_s),
        )

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [f"session {self.session}: {_summary(self.comparison)}"]
        if first := self.comparison.first_difference:
            words = f"recorded {_words(first.recorded)}, replayed {_words(first.replayed)}"
            lines.append(f"  first in step {first.step_id}, slot {first.slot}: {words}")
        if self.recorded_end:
            lines.append(f"  the recorded session ended with {self.recorded_end}")
        if self.num_further_steps:
            lines.append(f"  {_count(self.num_further_steps, 'further step')} ran of which no result was recorded")
        if self.recorded_on != self.replayed_on:
            lines.append(f"  recorded on {self.recorded_on}, replayed on {self.replayed_on}")
        lines.append(f"  {'':10}{'device p50':>14}{'device p99':>14}{'in all':>14}")
        for name, times in (("recorded", self.recorded), ("replayed", self.replayed)):
            steps = "".join(f"{_time(number, 'ms'):>14}" for number in (times.step_p50_ms, times.step_p99_ms))
            lines.append(f"  {name:10}{steps}{_time(times.wall_s, 's'):>14}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The report as JSON."""
        fields = dataclasses.asdict(self)
        return {"session": fields.pop("session"), **fields.pop("comparison"), **fields}


def _summary(comparison: Comparison) -> str:
    counts = (comparison.num_steps, "step"), (comparison.num_tokens, "token"), (comparison.num_sequences, "sequence")
    steps, tokens, sequences = (_count(number, noun) for number, noun in counts)
    differences = "no difference"
    if comparison.num_differences:
        differing = _count(comparison.num_different_sequences, "sequence")
        differences = f"{_count(comparison.num_differences, 'difference')} in {differing}"
    return f"{steps}, {tokens} of {sequences}, {differences}"


def _place(info: pb.ExecutorInfo) -> str:
    return f"{info.tensor_parallel_size} x {info.device}, {info.dtype}"


def _failure(end: Status | None) -> str | None:
    """The status of a session that neither side meant to end."""
    if end is None or end.code in (code_pb2.OK, code_pb2.CANCELLED):
        return None
    return f"{code_pb2.Code.Name(end.code)}: {end.message}"


def _words(sample: Sample | None) -> str:
    if sample is None:
        return "nothing"
    if sample.token_id is None:
        return "a failure"
    return f"token {sample.token_id}{_FINISH_REASONS[sample.finish_reason]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _time(number: float | None, unit: str) -> str:
    return "none" if number is None else f"{number:.3f} {unit}"
