"""The contract between the session and whatever runs plans."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from executor_service.plan import Column, Limits, Plan

CONTINUES, STOPPED, LENGTH = 0, 1, 2  # StepResult.finish_reasons


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What one part of a step produced: see StepResult in executor.proto. The arrays belong to the receiver."""

    step_id: int
    partial: bool  # another output of this step follows
    slots: Column  # [num_sampled]
    token_ids: Column  # [num_sampled]
    finish_reasons: Column  # [num_sampled]
    slot_errors: list[tuple[int, str]]
    device_time_ns: int


@dataclasses.dataclass(frozen=True)
class RunnerInfo:
    """The runner's part of ExecutorInfo; the fields mean what they mean there."""

    architecture: str
    model_digest: str
    weights_digest: str
    dtype: str
    device: str
    limits: Limits
    graph_batch_sizes: tuple[int, ...]


class Runner(Protocol):
    """Runs plans in order on one device, from one thread."""

    @property
    def info(self) -> RunnerInfo:
        """What the core needs to know; fixed from start to end."""
        ...

    def reset(self) -> None:
        """Empty every slot; the KV entries are forgotten."""
        ...

    def execute(self, plan: Plan) -> Iterator[StepOutput]:
        """Run one plan; yields each step's output as soon as the host has it, a partial one after the prefill
        phase where both phases sample."""
        ...
