"""Log-probabilities of prompts, chunk by chunk as they are computed, on the CPU."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from executor_service.runner.runner import PromptLogprobs
from kernels.logits import log_probabilities

_MAX_LOGITS = 1 << 24  # that are in memory at once: 64 MiB in float32


@dataclasses.dataclass
class PromptReport:
    """What is asked of one slot's prompt."""

    num_logprobs: int  # tokens for each position, the one that stands there included
    num_prompt_tokens: int
    has_failed: bool = False  # a logit was not finite


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive known tokens of a slot that a prefill computes."""

    slot: int
    start: int  # position of the first one
    count: int
    first_row: int  # among those of all chunks


def report_chunk(
    report: PromptReport,
    chunk: Chunk,
    known_token_ids: Tensor,
    vocab_size: int,
    compute_logits: Callable[[Tensor], Tensor],
) -> PromptLogprobs | None:
    """Report the prompt's tokens that follow the chunk's positions; None where there are none, or a logit failed.

    known_token_ids: [num_known] int64; compute_logits: rows of the prefill, [n] int64, to float32 logits of the whole
    vocabulary, [n, vocab_size]. It is called for so few rows at once that memory does not grow with the chunk.
    """
    count = min(chunk.count, report.num_prompt_tokens - 1 - chunk.start)
    if count <= 0 or report.has_failed:
        return None
    own = known_token_ids[chunk.start + 1 : chunk.start + 1 + count]
    rows = torch.arange(chunk.first_row, chunk.first_row + count)
    rows_at_once = max(1, _MAX_LOGITS // vocab_size)
    parts = []
    for rows_now, own_now in zip(rows.split(rows_at_once), own.split(rows_at_once), strict=True):
        logits = compute_logits(rows_now)
        report.has_failed |= not bool(logits.sum(-1).isfinite().all())
        parts.append(log_probabilities(logits, own_now, report.num_logprobs - 1))
    if report.has_failed:
        return None
    token_ids, logprobs, ranks = (torch.cat(columns).numpy().flatten() for columns in zip(*parts, strict=True))
    return PromptLogprobs(chunk.slot, chunk.start + 1, token_ids.astype(np.int32), logprobs, ranks.astype(np.int32))
