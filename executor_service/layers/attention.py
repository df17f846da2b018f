"""What a step tells attention, and what a device answers.

Everything that is the same for all layers of a step (indices of live blocks, masks) is prepared once, in `begin_*`;
the returned callable is then called by each layer with its own KV cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

# (q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim],
#  kv_cache [num_blocks, num_kv_heads, 2, block_size, head_dim]) -> [num_tokens, num_heads, head_dim]
# Stores k and v into the cache, then attends. Only the result may share memory with q, k and v.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class PrefillMetadata:
    """The prompt chunks of a step, one after the other."""

    slot_mapping: Tensor  # [num_tokens] int64: block * block_size + offset
    query_starts: tuple[int, ...]  # [num_seqs + 1], on the host
    context_lens: tuple[int, ...]  # [num_seqs], on the host: tokens visible after this chunk, cached ones included
    block_tables: Tensor  # [num_seqs, max_blocks] int32; entries past a sequence's blocks: any valid id


@dataclasses.dataclass(frozen=True)
class DecodeMetadata:
    """One token each of a batch of sequences."""

    slot_mapping: Tensor  # [batch] int64: block * block_size + offset
    block_tables: Tensor  # [batch, max_blocks] int32; entries past a sequence's blocks: any valid id
    context_lens: Tensor  # [batch] int32, the current token included


class AttentionBackend(Protocol):
    """Attention over the paged KV cache on one device."""

    def begin_prefill(self, metadata: PrefillMetadata) -> Attend:
        """Causal attention of each chunk over its sequence's context; the chunk is that context's tail."""
        ...

    def begin_decode(self, metadata: DecodeMetadata) -> Attend:
        """Attention of each sequence's newest token over its context."""
        ...
