"""CUDA graphs of steps, for each size to which steps are padded: of a whole step, and of one up to its logits.

The second kind is for steps with special rows, which go on launch by launch.
"""

import bisect
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from executor_service.runner.gpu.prompt_rows import PromptRows
from executor_service.runner.gpu.special_rows import NOTHING_SPECIAL, SpecialRows
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
        # By size, and whether the step samples.
        self._decode_graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._prefill_graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    def capture(self, nobody: SpecialRows) -> None:
        """Capture every size, the largest first, so that the others find their memory in one pool.

        nobody: for what a step with special rows launches behind its graph, whose kernels are compiled now too.
        """
        for size in reversed(self._prefill_sizes):
            self._capture_prefill(size)
        for size in reversed(self.decode_sizes):
            self._capture_decode(size)
            self._program.sample_special(size, nobody, is_decode=True)

    def capture_largest(self) -> None:
        """Capture the sizes that take the most memory."""
        for size in self._prefill_sizes[-1:]:
            self._capture_prefill(size)
        self._capture_decode(self.decode_sizes[-1])

    def _capture_prefill(self, size: int) -> None:
        for samples in (True, False):
            launch = functools.partial(self._program.prefill, self._padded(size), samples=samples)
            self._prefill_graphs[size, samples] = self._capture(launch)

    def _capture_decode(self, size: int) -> None:
        for samples in (True, False):
            launch = functools.partial(self._program.decode, size, self._max_context, samples=samples)
            self._decode_graphs[size, samples] = self._capture(launch)

    def run_decode(self, num_rows: int, longest_context: int, special: SpecialRows | None = None) -> Tensor | None:
        """A decode step of `num_rows`, at least 1; longest_context: tokens, an upper bound.

        Returns what StepProgram.sample_special does.
        """
        size = self.decode_sizes[bisect.bisect_left(self.decode_sizes, num_rows)]
        samples = special is None
        if graph := self._decode_graphs.get((size, samples)):
            graph.replay()
        else:
            self._program.decode(size, longest_context, samples=samples)
        return None if special is None else self._program.sample_special(size, special, is_decode=True)

    def padded_prefill(self, shape: PrefillShape) -> PrefillShape:
        """The shape to which a prefill is padded: a captured one, or, for a large prefill, its own."""
        if shape.num_seqs > self._prefill_seqs or shape.num_tokens > max(self._prefill_sizes, default=0):
            return shape
        return self._padded(min(size for size in self._prefill_sizes if size >= shape.num_tokens))

    def run_prefill(self, padded: PrefillShape) -> None:
        """A prefill step without special rows; `padded`: by padded_prefill."""
        self._run_prefill(padded, samples=True)

    def run_special_prefill(
        self, padded: PrefillShape, special: SpecialRows | None, prompts: PromptRows | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """A prefill step with special rows or rows of prompts, or both; `padded`: by padded_prefill.

        Returns what StepProgram.sample_special and prefill_and_report do.
        """
        prompt_entries = None
        if prompts is None:
            self._run_prefill(padded, samples=False)
        else:
            prompt_entries = self._program.prefill_and_report(padded, prompts)
        special = special or NOTHING_SPECIAL
        return self._program.sample_special(padded.num_samples, special, is_decode=False), prompt_entries

    def _run_prefill(self, padded: PrefillShape, *, samples: bool) -> None:
        graph = self._prefill_graphs.get((padded.num_tokens, samples))
        if graph and padded == self._padded(padded.num_tokens):
            graph.replay()
        else:
            self._program.prefill(padded, samples=samples)

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
