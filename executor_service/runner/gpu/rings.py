"""What host and device tell each other in every step: two rings of pinned memory that both of them address.

The device counts the steps that have ended, the host those that it has launched, and a step's entry is its number
modulo the size of the rings. So a launch carries no argument, and a graph can be replayed as it is.
"""

import dataclasses
import threading

import numpy as np
from numpy.typing import NDArray

from executor_service.plan import Column
from executor_service.runner.gpu.staging import pinned
from kernels.gpu.step_rings import RingLayout

RING_SIZE = 256  # steps; the host waits where it is that far ahead of whoever reads the results


class StepRings:
    """Entries of plans (host to device) and of results (device to host); see kernels/gpu/step_rings.py."""

    def __init__(self, max_batch: int) -> None:
        self.layout = RingLayout(max_batch, max_appends=2 * max_batch)
        self.plans = pinned(RING_SIZE, self.layout.inputs_size)
        self.results = pinned(RING_SIZE, self.layout.result_size)
        self._plans: NDArray[np.int32] = self.plans.numpy()
        self._results: NDArray[np.int32] = self.results.numpy()
        self.num_launched = 0
        self._free = threading.Semaphore(RING_SIZE)

    def claim(self) -> int:
        """The number of the step to be launched next; blocks while its entry holds a result that nobody has read."""
        self._free.acquire()
        step = self.num_launched
        self.num_launched += 1
        return step

    def write_plan(self, step: int, rows: Column | None, appends: Column) -> None:
        """What changes before a decode step.

        rows: [num_rows], their slots, None where they are the last step's; appends: [3, num_appends], slot, column and
        block of each appended block.
        """
        entry, layout = self._plans[step % RING_SIZE], self.layout
        num_appends = appends.shape[1]
        entry[:2] = num_appends, rows is not None
        if rows is not None:
            entry[layout.rows()] = -1
            entry[layout.rows()][: len(rows)] = rows
        for index in range(3 if num_appends else 0):
            entry[layout.append(index)][:num_appends] = appends[index]

    def span_ns(self, step: int) -> tuple[int, int]:
        """When a step began and ended by the device's clock, as long as its entry is not used again."""
        _, begin_ns, end_ns = self._results[step % RING_SIZE][:6].view(np.int64).tolist()
        return begin_ns, end_ns

    def read_result(self, step: int, num_rows: int) -> "RingResult":
        """Copies of a step's result."""
        entry, layout = self._results[step % RING_SIZE], self.layout
        number, begin_ns, end_ns = entry[:6].view(np.int64).tolist()
        assert number == step + 1, f"step {step} is not there: the entry holds {number - 1}"
        token_ids, reasons = (entry[layout.result(index)][:num_rows].copy() for index in (0, 1))
        return RingResult(token_ids, reasons, end_ns - begin_ns)

    def release(self) -> None:
        """Let the oldest entry that was claimed be used again."""
        self._free.release()


@dataclasses.dataclass(frozen=True)
class RingResult:
    """What the device wrote for each row."""

    token_ids: Column  # [num_rows]
    reasons: Column  # [num_rows], REASON_* of kernels/gpu/step_rings.py
    device_time_ns: int
