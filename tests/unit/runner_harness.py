"""A tiny model, settings for a CPU runner of it, and a core that sends plans made by hand."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from executor_service.config import ExecutorConfig
from executor_service.distributed.group import RankGroup
from executor_service.distributed.placement import Placement
from executor_service.plan import NewSequence, Plan, Sampling
from executor_service.runner.cpu_runner import CpuRunner
from executor_service.runner.runner import PromptLogprobs, StepLogprobs, StepOutput

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, choice_index=0)
VOCAB_SIZE, BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 160, 8, 48, 96
ALONE = RankGroup(Placement(), torch.device("cpu"))


def save_tiny_llama(directory: Path, vocab_size: int = VOCAB_SIZE) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def tiny_settings(model_directory: Path, **changes: Any) -> ExecutorConfig:
    fields: dict[str, Any] = {
        "model": str(model_directory), "dtype": "float32", "block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS,
        "max_num_seqs": 6, "max_tokens_per_step": 64, "max_model_len": MAX_MODEL_LEN, "num_threads": 1,
    }  # fmt: skip
    return ExecutorConfig(**(fields | changes))


def column(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def make_plan(
    step_id: int,
    new: Sequence[NewSequence] = (),
    iterations: int = 0,
    masks: Mapping[int, Collection[int]] | None = None,
    **columns: Sequence[int],
) -> Plan:
    """masks: of slots, the tokens that are allowed."""
    masks = masks or {}
    names = ("release_slots", "append_slots", "append_blocks", "prefill_slots", "prefill_starts", "prefill_counts",
             "prefill_samples", "join_slots", "leave_slots")  # fmt: skip
    return Plan(
        step_id=step_id, new_sequences=list(new), iterations=iterations,
        mask_slots=column(list(masks)), masks=np.array([mask_words(allowed) for allowed in masks.values()]),
        **{name: column(columns.get(name, ())) for name in names},
    )  # fmt: skip


def mask_words(allowed: Collection[int]) -> np.ndarray:
    bits = np.zeros(-(-VOCAB_SIZE // 32) * 32, dtype=np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def sequence(slot: int, tokens: Sequence[int], blocks: Sequence[int], **changes: Any) -> NewSequence:
    fields: dict[str, Any] = {
        "slot": slot, "token_ids": column(tokens), "num_prompt_tokens": len(tokens), "num_cached_tokens": 0,
        "block_ids": column(blocks), "sampling": GREEDY, "stop_token_ids": column([]),
        "max_total_tokens": MAX_MODEL_LEN,
    }  # fmt: skip
    return NewSequence(**(fields | changes))


def chunks(*rows: tuple[int, int, int, int]) -> dict[str, Any]:
    """prefill columns from (slot, start, count, samples)."""
    names = ("prefill_slots", "prefill_starts", "prefill_counts", "prefill_samples")
    return dict(zip(names, (list(values) for values in zip(*rows, strict=True)), strict=True))


@dataclasses.dataclass(frozen=True)
class Reported:
    """Log-probabilities at one position, the token's own first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class Core:
    """Sends plans one after the other, and keeps what each slot samples and what is reported of it."""

    def __init__(self, runner: CpuRunner) -> None:
        self.runner = runner
        self.next_step_id = 1
        self.tokens: dict[int, list[int]] = {}  # slot -> sampled
        self.reasons: dict[int, int] = {}  # slot -> last finish reason
        self.logprobs: dict[int, list[Reported]] = {}  # slot -> of sampled tokens
        self.prompt_logprobs: dict[int, list[Reported]] = {}  # slot -> of the prompt's tokens from the second on
        self._num_logprobs: dict[int, tuple[int, int]] = {}  # slot -> of sampled tokens, and of the prompt's

    def run(
        self,
        new: Sequence[NewSequence] = (),
        iterations: int = 0,
        masks: Mapping[int, Collection[int]] | None = None,
        **columns: Sequence[int],
    ) -> list[StepOutput]:
        plan = make_plan(self.next_step_id, new, iterations, masks, **columns)
        for sequence in new:
            sampling = sequence.sampling
            self._num_logprobs[sequence.slot] = sampling.num_logprobs, sampling.num_prompt_logprobs
        outputs = list(self.runner.execute(plan))
        finals = [output.step_id for output in outputs if not output.partial]
        assert finals == list(range(plan.step_id, plan.step_id + max(1, iterations)))
        self.next_step_id = finals[-1] + 1
        for output in outputs:
            self._keep(output)
        return outputs

    def _keep(self, output: StepOutput) -> None:
        for slot, token, reason in zip(output.slots, output.token_ids, output.finish_reasons, strict=True):
            self.tokens.setdefault(int(slot), []).append(int(token))
            self.reasons[int(slot)] = int(reason)
        asked = [slot for slot in output.slots.tolist() if self._num_logprobs[slot][0]]
        assert (output.logprobs is not None) == bool(asked)
        if output.logprobs:
            widths = [self._num_logprobs[slot][0] for slot in asked]
            for slot, part in zip(asked, cut(output.logprobs, widths), strict=True):
                self.logprobs.setdefault(slot, []).append(part)
        for part in output.prompt_logprobs:
            reported = self.prompt_logprobs.setdefault(part.slot, [])
            assert part.start == len(reported) + 1
            reported += cut(part, [self._num_logprobs[part.slot][1]] * len(part.ranks))


def cut(columns: StepLogprobs | PromptLogprobs, widths: Sequence[int]) -> list[Reported]:
    """By position, each with as many tokens as `widths` says."""
    ends = np.cumsum(widths)
    assert (columns.token_ids.dtype, columns.logprobs.dtype, columns.ranks.dtype) == (np.int32, np.float32, np.int32)
    assert len(columns.token_ids) == len(columns.logprobs) == ends[-1]
    return [
        Reported(columns.token_ids[end - width : end].tolist(), columns.logprobs[end - width : end].tolist(), rank)
        for end, width, rank in zip(ends, widths, columns.ranks.tolist(), strict=True)
    ]


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
