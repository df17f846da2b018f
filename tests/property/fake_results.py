"""What the fake executor says: results as it encodes them, and what the test may know about each."""

import dataclasses

import numpy as np

from protos.duet.executor.v1 import executor_pb2 as pb
from tests.property.fake_model import Sequence


class ProtocolViolation(AssertionError):
    """The core planned something that an executor could not run, or that reads what is not its own."""


class Crashed(Exception):
    """The executor died of a sequence: see Sequence.seating."""


@dataclasses.dataclass(frozen=True)
class SampledRow:
    """A token on its way to the core."""

    seating: int  # of its sequence
    token: int
    reason: int
    clean: bool  # computed from undamaged rows


@dataclasses.dataclass(frozen=True)
class Result:
    """A message, and what the test may know about it."""

    message: bytes
    rows: list[SampledRow]
    has_failures: bool


def check(holds: bool, message: str) -> None:
    """Raise ProtocolViolation unless it `holds`."""
    if not holds:
        raise ProtocolViolation(message)


def column(values: list[int]) -> bytes:
    """Integers as they stand in a message."""
    return np.array(values, dtype="<i4").tobytes()


def floats(values: list[float]) -> bytes:
    """Numbers as they stand in a message."""
    return np.array(values, dtype="<f4").tobytes()


def add_logprobs(message: pb.StepResult, sequences: list[Sequence]) -> None:
    """Of the last token of each: its log-probability is the negative of its place among the generated ones."""
    asking = [sequence for sequence in sequences if sequence.num_logprobs]
    token_ids, values = list[int](), list[float]()
    for sequence in asking:
        place = len(sequence.tokens) - sequence.num_prompt_tokens - 1
        token_ids += [sequence.tokens[-1]] * sequence.num_logprobs
        values += [-float(place)] * sequence.num_logprobs
    message.logprob_token_ids, message.logprobs = column(token_ids), floats(values)
    message.logprob_ranks = column([1] * len(asking))


def prompt_logprobs(slot: int, sequence: Sequence, start: int, end: int) -> list[pb.PromptLogprobs]:
    """Of the prompt's tokens that follow positions `start` to `end` - 1, each the negative of its position."""
    positions = range(start + 1, min(end + 1, sequence.num_prompt_tokens))
    if not sequence.num_prompt_logprobs or not positions:
        return []
    part = pb.PromptLogprobs(
        slot=slot,
        start=positions.start,
        token_ids=column([sequence.tokens[at] for at in positions for _ in range(sequence.num_prompt_logprobs)]),
        logprobs=floats([-float(at) for at in positions for _ in range(sequence.num_prompt_logprobs)]),
        ranks=column([1] * len(positions)),
    )
    return [part]
