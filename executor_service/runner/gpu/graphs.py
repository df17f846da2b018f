"""CUDA graphs of whole steps, one for each size to which steps are padded."""

import bisect
from collections.abc import Callable
from typing import Any

import torch

from executor_service.runner.gpu.step_program import PrefillShape, StepProgram

PREFILL_TOKENS = (64, 128, 256, 512)  # a chunk of more keeps the device busy while its kernels are launched one by one
PREFILL_SEQS = 8  # chunks of a captured prefill


def decode_batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, then multiples of 8, and max_batch itself: ascending."""
    return [size for size in (1, 2, 4, *range(8, max_batch, 8)) if size < max_batch] + [max_batch]


class StepGraphs:
    """Runs steps padded to captured sizes; where nothing was captured, launch by launch."""

    def __init__(self, program: StepProgram, max_batch: int, max_tokens: int, max_context: int) -> None:
        """max_context: tokens of the longest sequence."""
        self._program = program
        self._max_context = max_context
        self.decode_sizes = decode_batch_sizes(max_batch)
        self._prefill_sizes = [size for size in PREFILL_TOKENS if size <= max_tokens]
        self._prefill_seqs = min(PREFILL_SEQS, max_batch)
        self._pool: Any = None  # of memory, the first graph's
        self._decode_graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._prefill_graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self) -> None:
        """Capture every size, the largest first, so that the others find their memory in one pool."""
        for size in reversed(self._prefill_sizes):
            self._capture_prefill(size)
        for size in reversed(self.decode_sizes):
            self._capture_decode(size)

    def capture_largest(self) -> None:
        """Capture the sizes that take the most memory."""
        for size in self._prefill_sizes[-1:]:
            self._capture_prefill(size)
        self._capture_decode(self.decode_sizes[-1])

    def _capture_prefill(self, size: int) -> None:
        self._prefill_graphs[size] = self._capture(lambda: self._program.prefill(self._padded(size)))

    def _capture_decode(self, size: int) -> None:
        self._decode_graphs[size] = self._capture(lambda: self._program.decode(size, self._max_context))

    def run_decode(self, num_rows: int, longest_context: int) -> None:
        """A decode step of `num_rows`, at least 1; longest_context: tokens, an upper bound."""
        size = self.decode_sizes[bisect.bisect_left(self.decode_sizes, num_rows)]
        if graph := self._decode_graphs.get(size):
            graph.replay()
        else:
            self._program.decode(size, longest_context)

    def padded_prefill(self, shape: PrefillShape) -> PrefillShape:
        """The shape to which a prefill is padded: a captured one, or, for a large prefill, its own."""
        if shape.num_seqs > self._prefill_seqs or shape.num_tokens > max(self._prefill_sizes, default=0):
            return shape
        return self._padded(min(size for size in self._prefill_sizes if size >= shape.num_tokens))

    def run_prefill(self, padded: PrefillShape) -> None:
        """A prefill step; `padded`: by padded_prefill."""
        graph = self._prefill_graphs.get(padded.num_tokens)
        if graph and padded == self._padded(padded.num_tokens):
            graph.replay()
        else:
            self._program.prefill(padded)

    def _padded(self, num_tokens: int) -> PrefillShape:
        return PrefillShape(
            num_tokens=num_tokens,
            num_seqs=self._prefill_seqs,
            num_samples=self._prefill_seqs,
            longest_chunk=num_tokens,
            has_cached=True,
        )

    def _capture(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        launch()  # compiles kernels and makes cuBLAS's handles, neither of which may happen in a capture
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, whose garbage collection and device-wide synchronization add seconds to a start.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        launch()
        graph.capture_end()
        self._pool = graph.pool()
        return graph
