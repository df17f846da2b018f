"""Where ranks have parts of the vocabulary, a step with special rows samples from all logits, on every rank."""

import dataclasses

import numpy as np
import pytest
import torch

from executor_service.plan import NO_COLUMN, NewSequence, Plan, Sampling
from executor_service.runner.gpu.prompt_rows import PromptRows
from executor_service.runner.gpu.special_rows import SpecialSlots
from executor_service.runner.gpu.special_sampler import SpecialSampler, Vocabulary
from kernels.gpu.sampler import Workspace
from tests.kernels.gpu.test_gpu_sampler import make_state, row_slots_of

VOCAB_SIZE, SPAN, MAX_ROWS = 1100, 600, 4
ROWS = [{"temperature": 0.0}, {"seed": 5}, {"seed": 6, "top_p": 0.8}]
LENGTHS = [7, 9, 30]
PLAN = Plan(1, NO_COLUMN, [], *[NO_COLUMN] * 8, iterations=1)


def samplings() -> list[Sampling]:
    plain = Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, choice_index=0)
    changed = dataclasses.replace(
        plain, presence_penalty=1.5, bias_token_ids=np.array([700], np.int32), bias_values=np.ones(1, np.float32)
    )
    return [dataclasses.replace(changed, num_logprobs=5), plain, changed]


def special_slots(device: torch.device) -> SpecialSlots:
    slots = SpecialSlots(len(ROWS), VOCAB_SIZE, device)
    tokens = np.arange(0, 40, 3, dtype=np.int32)
    for slot, sampling in enumerate(samplings()):
        slots.admit(NewSequence(slot, tokens, 2, 0, NO_COLUMN, sampling, NO_COLUMN, 99))
    return slots


def sample(logits: torch.Tensor, rank: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens and entries of two steps: the second one knows what the first one sampled."""
    device = logits.device
    part = slice(0, VOCAB_SIZE) if rank is None else slice(rank * SPAN, min((rank + 1) * SPAN, VOCAB_SIZE))

    def gather(own: torch.Tensor) -> torch.Tensor:
        assert torch.equal(own, logits[: len(own), part])
        return torch.cat((logits[: len(own)], torch.full_like(own, torch.nan)), 1)[:, :VOCAB_SIZE]  # a view

    workspace = Workspace.empty(MAX_ROWS, VOCAB_SIZE, logits.dtype, device)
    sampler = SpecialSampler(
        MAX_ROWS, Vocabulary(VOCAB_SIZE, part.stop - part.start, gather), workspace, make_state(ROWS, device)
    )
    row_slots = row_slots_of(ROWS, device)
    slots = np.array(row_slots.tolist(), np.int32)
    asked = special_slots(device)
    special = asked.find(slots, np.array(LENGTHS), PLAN)
    assert special is not None
    tokens, entries = [], []
    for _ in range(2):
        sampler.keep(logits[:, part], row_slots, torch.tensor(LENGTHS, dtype=torch.int32, device=device))
        chosen = sampler.sample(len(ROWS), special)
        assert chosen.entries is not None
        tokens.append(chosen.token_ids.tolist())
        entries.append(chosen.entries[:, [0, 1, 2, 3, 4, 42]].flatten().tolist())
    return tokens, entries


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_rank_samples_and_reports_what_one_would(dtype, device):
    logits = torch.randn((len(ROWS), VOCAB_SIZE), generator=torch.Generator().manual_seed(1)).to(device, dtype)
    alone = sample(logits, None)
    assert sample(logits, 0) == sample(logits, 1) == alone
    assert alone[0][0] != alone[0][1]  # a penalty fell on what was sampled


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_prompts_are_reported_from_all_logits_a_few_rows_at_a_time(rank, device):
    logits = torch.randn((7, VOCAB_SIZE), generator=torch.Generator().manual_seed(1)).to(device)
    part = slice(0, VOCAB_SIZE) if rank is None else slice(rank * SPAN, min((rank + 1) * SPAN, VOCAB_SIZE))
    at_once: list[list[int]] = []

    def compute(rows: torch.Tensor) -> torch.Tensor:
        at_once.append(rows.tolist())
        return logits[rows.long(), part]

    def gather(own: torch.Tensor) -> torch.Tensor:
        assert torch.equal(own, logits[torch.tensor(at_once[-1], device=device), part])
        return logits[torch.tensor(at_once[-1], device=device)]

    vocabulary = Vocabulary(VOCAB_SIZE, part.stop - part.start, gather)
    workspace = Workspace.empty(MAX_ROWS, VOCAB_SIZE, logits.dtype, device)
    sampler = SpecialSampler(MAX_ROWS, vocabulary, workspace, make_state(ROWS, device))
    rows, targets = [6, 1, 2, 4, 5, 0], [3, 0, 1099, 600, 599, 5]
    columns = torch.tensor([rows, [0, 1, 2, 3, 0, 1], [2] * 6, targets], dtype=torch.int32, device=device)
    entries = sampler.report_prompts(PromptRows([], 4, columns), compute)
    assert at_once == [rows[:4], rows[4:]]
    assert entries[:, 0].tolist() == targets
    assert entries[:, 1].tolist() == logits[rows].argmax(-1).tolist()
    own = logits[rows].gather(1, torch.tensor(targets, device=device)[:, None])
    assert entries[:, 42].tolist() == ((logits[rows] > own).sum(-1) + 1).tolist()
