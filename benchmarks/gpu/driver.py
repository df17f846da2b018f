"""Plans for a runner in this process: fixed batches of random prompts, without a scheduler or gRPC."""

import queue
import random
import threading
import time
from collections.abc import Sequence

import numpy as np

from executor_service.plan import NewSequence, Plan, Sampling
from executor_service.runner.runner import Pending, Runner, StepOutput

SAMPLING = Sampling(temperature=0.6, top_k=0, top_p=1.0, min_p=0.0, seed=1, choice_index=0)
MAX_INFLIGHT_STEPS = 2
_COLUMNS = ("release_slots", "append_slots", "append_blocks", "prefill_slots", "prefill_starts", "prefill_counts",
            "prefill_samples", "join_slots", "leave_slots")  # fmt: skip


class Driver:
    """Sends plans as a core would, a few ahead of their results."""

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        self._runner = runner
        self._random = random.Random(seed)
        self._step_id = 1
        self._launched: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._in_flight = threading.Semaphore(MAX_INFLIGHT_STEPS)
        self.outputs: list[tuple[float, StepOutput]] = []  # when each was there (perf_counter), and what
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while (pending := self._launched.get()) is not None:
            output = pending.wait()
            self.outputs.append((time.perf_counter(), output))
            if not output.partial:
                self._in_flight.release()

    def send(self, new: Sequence[NewSequence] = (), iterations: int = 0, **columns: Sequence[int]) -> None:
        """Run a plan, a step at a time."""
        arrays = {name: np.array(columns.get(name, ()), dtype=np.int32) for name in _COLUMNS}
        plan = Plan(step_id=self._step_id, new_sequences=list(new), iterations=iterations, **arrays)
        self._step_id += max(iterations, 1)
        for _ in range(max(iterations, 1)):
            self._in_flight.acquire()
        for pending in self._runner.execute(plan):
            self._launched.put(pending)

    def drain(self) -> list[tuple[float, StepOutput]]:
        """Wait for every result and return them."""
        for _ in range(MAX_INFLIGHT_STEPS):
            self._in_flight.acquire()
        for _ in range(MAX_INFLIGHT_STEPS):
            self._in_flight.release()
        outputs, self.outputs = self.outputs, []
        return outputs

    def close(self) -> None:
        """End the reader."""
        self._launched.put(None)
        self._reader.join()

    def prefill(self, batch: int, input_len: int, output_len: int, sampling: Sampling = SAMPLING) -> list[list[int]]:
        """Admit `batch` random prompts into slots 0 and up, and compute them in plans of the token budget.

        Returns each slot's blocks; they cover the prompt and the output.
        """
        limits = self._runner.info.limits
        num_blocks = -(-(input_len + output_len) // limits.block_size)
        tables = [list(range(slot * num_blocks, (slot + 1) * num_blocks)) for slot in range(batch)]
        sequences = [
            NewSequence(
                slot=slot,
                token_ids=np.array(self._random.choices(range(limits.vocab_size), k=input_len), dtype=np.int32),
                num_prompt_tokens=input_len,
                num_cached_tokens=0,
                block_ids=np.array(tables[slot], dtype=np.int32),
                sampling=sampling,
                stop_token_ids=np.zeros(0, dtype=np.int32),
                max_total_tokens=input_len + output_len,
            )
            for slot in range(batch)
        ]
        slot, start = 0, 0
        while slot < batch:
            budget, first = limits.max_tokens_per_step, slot
            chunks: list[tuple[int, int, int, int]] = []
            while budget and slot < batch:
                count = min(budget, input_len - start)
                chunks.append((slot, start, count, int(start + count == input_len)))
                budget, start = budget - count, start + count
                if start == input_len:
                    slot, start = slot + 1, 0
            new = [sequences[s] for s, begin, _, _ in chunks if begin == 0]
            assert first <= slot
            names = ("prefill_slots", "prefill_starts", "prefill_counts", "prefill_samples")
            self.send(new, **dict(zip(names, zip(*chunks, strict=True), strict=True)))
        return tables

    def decode(self, batch: int, steps: int, *, joins: bool) -> None:
        """`steps` decode steps of slots 0 to batch - 1, a plan each."""
        for step in range(steps):
            self.send(iterations=1, join_slots=range(batch) if joins and step == 0 else ())

    def release(self, batch: int) -> None:
        """Empty slots 0 to batch - 1."""
        self.send(release_slots=range(batch))
