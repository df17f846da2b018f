"""Counts the operations of one decode step and times the step: `python -m docs.learn.launches [MODEL]`."""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from docs.learn.plans import Executor, model_directory

NUM_STEPS = 5
PROMPTS = ("The capital of France is", "One, two,", "The sea is", "In the year", "My favourite colour is",
           "Once upon a time", "A list of rivers:", "The opposite of hot is")  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_views = 0  # another look at the same memory: nothing is computed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count the call and do it."""
        if func.is_view:
            self.num_views += 1
        else:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def main(argv: Sequence[str]) -> None:
    """Print a line for one running sequence and one for eight, then what the operations of a step are."""
    executor = Executor(model_directory(argv), cpu_kernels="torch")  # the library in C is asked once a step
    for batch in (1, 8):
        slots = range(batch)
        executor.prefill(*(executor.sequence(slot, PROMPTS[slot]) for slot in slots))
        executor.run(join_slots=slots, iterations=1)
        times_ms = []
        for _ in range(NUM_STEPS):
            start = time.perf_counter()
            executor.run(iterations=1)
            times_ms.append((time.perf_counter() - start) * 1e3)
        with Operations() as operations:
            executor.run(iterations=1)
        executor.run(release_slots=slots)
        total = operations.counts.total()
        print(f"{batch} running: {total} operations and {operations.num_views} views a step, ", end="")
        print(f"{statistics.median(times_ms):.1f} ms")
        if batch == 1:
            for name, count in operations.counts.most_common(5):
                print(f"  {count:4} x {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
