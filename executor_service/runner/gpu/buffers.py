"""Every tensor that outlives a step, allocated once, so that graphs may refer to it."""

import dataclasses

import torch
from torch import Tensor

from executor_service.plan import Limits
from kernels.gpu.slot_state import NUM_FIELDS

MAX_STOP_TOKEN_IDS = 128  # of one sequence: those of its request, and the model's

CHUNK_COLUMNS = 5  # slot, start, count, first row, context length: of each chunk of a prefill
SAMPLE_COLUMNS = 3  # row, slot, context length: of each chunk that samples


@dataclasses.dataclass(frozen=True)
class PrefillLayout:
    """How a prefill's columns stand in one array of int32, so that one copy brings them all to the device."""

    max_seqs: int
    max_tokens: int

    @property
    def header_size(self) -> int:
        """Integers before the token ids."""
        return self.max_seqs * (CHUNK_COLUMNS + SAMPLE_COLUMNS) + self.max_seqs + 1

    @property
    def size(self) -> int:
        """Integers in all."""
        return self.header_size + self.max_tokens


@dataclasses.dataclass(frozen=True)
class PrefillColumns:
    """Views of such an array, on the host or the device."""

    chunks: Tensor  # [CHUNK_COLUMNS, max_seqs]
    samples: Tensor  # [SAMPLE_COLUMNS, max_seqs]
    query_starts: Tensor  # [max_seqs + 1]
    input_ids: Tensor  # [max_tokens]


def split_columns(array: Tensor, layout: PrefillLayout) -> PrefillColumns:
    """array: [layout.size] int32."""
    n = layout.max_seqs
    sizes = [CHUNK_COLUMNS * n, SAMPLE_COLUMNS * n, n + 1, layout.max_tokens]
    chunks, samples, query_starts, input_ids = array.split(sizes)
    return PrefillColumns(chunks.view(-1, n), samples.view(-1, n), query_starts, input_ids)


class DeviceBuffers:
    """What lives on the device from start to end; kernels/gpu/slot_state.py says what state holds."""

    def __init__(self, limits: Limits, max_blocks_per_sequence: int, device: torch.device) -> None:
        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        max_seqs, max_tokens = limits.num_slots, limits.max_tokens_per_step
        self.state = zeros(NUM_FIELDS.value, max_seqs)
        self.stop_token_ids = zeros(max_seqs, MAX_STOP_TOKEN_IDS)
        self.block_tables = zeros(max_seqs, max_blocks_per_sequence)
        self.rows = torch.full((max_seqs,), -1, dtype=torch.int32, device=device)  # slots of the decode set, -1 = none
        self.layout = PrefillLayout(max_seqs, max_tokens)
        self.prefill_array = zeros(self.layout.size)
        self.prefill = split_columns(self.prefill_array, self.layout)
        self.cursor = zeros(1, dtype=torch.int64)  # steps that have ended
        self.clock = zeros(1, dtype=torch.int64)  # nanoseconds, when the running step began
