"""The contract between the session and whatever runs plans."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from executor_service.plan import Column, Limits, Plan

CONTINUES, STOPPED, LENGTH = 0, 1, 2  # StepResult.finish_reasons


@dataclasses.dataclass(frozen=True)
class StepLogprobs:
    """Log-probabilities of sampled tokens: see StepResult in executor.proto.

    Of the slots, in the order of StepOutput.slots, whose sequences asked for some; each has num_logprobs entries.
    """

    token_ids: Column  # [num_entries], a slot's sampled token, then the likeliest
    logprobs: NDArray[np.float32]  # [num_entries]
    ranks: Column  # [num_slots_that_asked]


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of consecutive tokens of a prompt: see PromptLogprobs in executor.proto."""

    slot: int
    start: int  # position of the first of these tokens
    token_ids: Column  # [num_positions * num_prompt_logprobs], the token at each position, then the likeliest
    logprobs: NDArray[np.float32]  # [num_positions * num_prompt_logprobs]
    ranks: Column  # [num_positions]


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
    logprobs: StepLogprobs | None = None  # None: nobody asked
    prompt_logprobs: list[PromptLogprobs] = dataclasses.field(default_factory=list)

    def wait(self) -> "StepOutput":
        """An output that is there already is a pending one for which nobody waits."""
        return self


class Pending(Protocol):
    """An output that the device is still working on."""

    @property
    def step_id(self) -> int:
        """As in StepOutput."""
        ...

    @property
    def partial(self) -> bool:
        """As in StepOutput."""
        ...

    def wait(self) -> StepOutput:
        """Block until it is there. Called once for each, in order, from one thread other than the runner's."""
        ...


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
    tensor_parallel_size: int = 1


class Runner(Protocol):
    """Runs plans in order on one device, from one thread; a device may still be busy with what was yielded."""

    @property
    def info(self) -> RunnerInfo:
        """What the core needs to know; fixed from start to end."""
        ...

    def reset(self) -> None:
        """Empty every slot; the KV entries are forgotten."""
        ...

    def execute(self, plan: Plan) -> Iterator[Pending]:
        """Run one plan, step by step, as the iterator is advanced; yields each step's output, and a partial one after
        the prefill phase where both phases sample. Raises: InvalidPlan, before anything has changed."""
        ...
