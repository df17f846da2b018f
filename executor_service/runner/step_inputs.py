"""What the model is given in a step, computed on the device from the slots' state."""

import dataclasses

import torch
from torch import Tensor

from executor_service.layers.attention import DecodeMetadata, PrefillMetadata
from executor_service.plan import Plan
from executor_service.runner.slots import SlotState


@dataclasses.dataclass(frozen=True)
class PrefillInputs:
    """The chunks of a plan, one after the other."""

    input_ids: Tensor  # [num_tokens] int64
    metadata: PrefillMetadata
    slots: Tensor  # [num_chunks] int64
    ends: Tensor  # [num_chunks] int64, the position after each chunk
    sampling_slots: Tensor  # [num_samples] int64
    sampling_rows: Tensor  # [num_samples] int64, each sampling chunk's last token


@dataclasses.dataclass(frozen=True)
class DecodeInputs:
    """The newest token of each decoding slot."""

    input_ids: Tensor  # [batch] int64
    metadata: DecodeMetadata


def prefill_inputs(plan: Plan, slots: SlotState) -> PrefillInputs:
    """Inputs for the plan's chunks, of which there is at least one."""
    device = slots.device
    chunk_slots, starts, counts, samples = (
        torch.as_tensor(column.astype("int64"), device=device)
        for column in (plan.prefill_slots, plan.prefill_starts, plan.prefill_counts, plan.prefill_samples)
    )
    chunks = zip(plan.prefill_slots.tolist(), plan.prefill_starts.tolist(), plan.prefill_counts.tolist(), strict=True)
    input_ids = torch.cat([_known(slots, slot)[start : start + count] for slot, start, count in chunks])

    query_ends = counts.cumsum(0)
    chunk_of_token = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
    offsets = starts - (query_ends - counts)  # position of a token less its row, by chunk
    positions = torch.arange(len(input_ids), device=device) + offsets[chunk_of_token]

    ends, is_sampling = plan.prefill_starts + plan.prefill_counts, samples.bool()
    metadata = PrefillMetadata(
        positions=positions,
        query_starts=(0, *plan.prefill_counts.cumsum().tolist()),
        context_lens=tuple(ends.tolist()),
        block_tables=slots.block_tables[chunk_slots],
    )
    return PrefillInputs(
        input_ids=input_ids,
        metadata=metadata,
        slots=chunk_slots,
        ends=starts + counts,
        sampling_slots=chunk_slots[is_sampling],
        sampling_rows=query_ends[is_sampling] - 1,
    )


def decode_inputs(slots: SlotState) -> DecodeInputs:
    """Inputs for all of `slots.decode_slots`."""
    indices = slots.decode_slots
    metadata = DecodeMetadata(slots.context_len[indices], slots.block_tables[indices])
    return DecodeInputs(slots.last_token[indices], metadata)


def _known(slots: SlotState, slot: int) -> Tensor:
    known = slots.known_token_ids[slot]
    assert known is not None, "the ledger admits chunks of occupied slots only"
    return known
