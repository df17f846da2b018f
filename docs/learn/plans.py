"""What the experiments share: the executor's runner in this process, and plans made by hand instead of by a core."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from executor_service.config import ExecutorConfig
from executor_service.plan import NewSequence, Plan, Sampling
from executor_service.runner.build import build_runner
from executor_service.runner.runner import Runner, StepOutput
from executor_service.weights.default_model import default_model, models_directory

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, choice_index=0)
BLOCK_SIZE = 16  # tokens; smaller than by default, so that there is more than one to be seen
MAX_TOTAL = 256  # tokens of a sequence, so that each can have blocks of its own from the start
_COLUMNS = (
    "release_slots", "append_slots", "append_blocks", "prefill_slots", "prefill_starts", "prefill_counts",
    "prefill_samples", "join_slots", "leave_slots",
)  # fmt: skip


def model_directory(argv: Sequence[str]) -> Path:
    """The program's one argument, or the default model, which is fetched at its first use."""
    return Path(argv[0]) if argv else default_model(models_directory(os.environ))


class Executor:
    """A runner, the model's tokenizer, and the plans that they were sent."""

    def __init__(self, model: Path, **settings: Any) -> None:
        """Load the model on the CPU; `settings` are fields of ExecutorConfig."""
        fields = {
            "device": "cpu", "dtype": "float32", "num_threads": 1, "block_size": BLOCK_SIZE, "num_blocks": 128,
            "max_num_seqs": 8,
        }  # fmt: skip
        self.runner: Runner = build_runner(ExecutorConfig(model=str(model), **(fields | settings)))
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._next_step_id = 1

    def sequence(self, slot: int, text: str, sampling: Sampling = GREEDY) -> NewSequence:
        """A prompt for a slot, with the blocks that MAX_TOTAL tokens need."""
        num_blocks = MAX_TOTAL // BLOCK_SIZE
        token_ids = self.tokenizer.encode(text).ids
        return NewSequence(
            slot=slot,
            token_ids=np.array(token_ids, dtype=np.int32),
            num_prompt_tokens=len(token_ids),
            num_cached_tokens=0,
            block_ids=np.arange(slot * num_blocks, (slot + 1) * num_blocks, dtype=np.int32),
            sampling=sampling,
            stop_token_ids=np.array([], dtype=np.int32),
            max_total_tokens=MAX_TOTAL,
        )

    def run(self, *new: NewSequence, iterations: int = 0, **columns: Sequence[int]) -> list[StepOutput]:
        """Run one plan to its end; what is not given is empty. See StepPlan in executor.proto."""
        arrays = {name: np.array(columns.get(name, ()), dtype=np.int32) for name in _COLUMNS}
        plan = Plan(step_id=self._next_step_id, new_sequences=list(new), iterations=iterations, **arrays)
        self._next_step_id += max(1, iterations)
        return [pending.wait() for pending in self.runner.execute(plan)]

    def prefill(self, *new: NewSequence) -> list[StepOutput]:
        """Compute whole prompts in one plan and sample the token after each."""
        return self.run(
            *new,
            prefill_slots=[sequence.slot for sequence in new],
            prefill_starts=[0 for _ in new],
            prefill_counts=[sequence.num_prompt_tokens for sequence in new],
            prefill_samples=[1 for _ in new],
        )
