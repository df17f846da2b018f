"""What a step tells attention, and what a device answers.

Everything that is the same for all layers of a step (indices of live blocks, masks, rotations) is prepared once, in
`begin_*`; the returned callable is then called by each layer with its own parameters and KV cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """What all attention layers of a model share, as one rank sees it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens a KV block holds
    dtype: torch.dtype
    norm_eps: float  # of the norms of queries and keys
    inv_freq: Tensor  # [head_dim / 2] float32, radians per position: see rotary.py


@dataclasses.dataclass(frozen=True)
class HeadParameters:
    """What happens to a layer's queries, keys and values before they are rotated; None: nothing."""

    bias: Tensor | None  # [(heads + 2 * kv_heads) * head_dim]
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]: the weight for each head of queries, then of keys


# (qkv [num_tokens, (heads + 2 * kv_heads) * head_dim], overwritten; parameters;
#  kv_cache [num_blocks, kv_heads, 2, block_size, head_dim]) -> [num_tokens, heads * head_dim]
# Adds the bias, normalizes and rotates queries and keys, stores keys and values into the cache, then attends.
Attend = Callable[[Tensor, HeadParameters, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class PrefillMetadata:
    """The prompt chunks of a step, one after the other."""

    positions: Tensor  # [num_tokens] int64
    query_starts: tuple[int, ...]  # [num_seqs + 1], on the host
    context_lens: tuple[int, ...]  # [num_seqs], on the host: tokens visible after this chunk, cached ones included
    block_tables: Tensor  # [num_seqs, max_blocks] int32; entries past a sequence's blocks: any valid id


@dataclasses.dataclass(frozen=True)
class DecodeMetadata:
    """One token each of a batch of sequences."""

    positions: Tensor  # [batch] int64: of each sequence's newest token, behind which its context ends
    block_tables: Tensor  # [batch, max_blocks] int32; entries past a sequence's blocks: any valid id


class AttentionBackend(Protocol):
    """Attention over the paged KV cache on one device."""

    def begin_prefill(self, metadata: PrefillMetadata) -> Attend:
        """Causal attention of each chunk over its sequence's context; the chunk is that context's tail."""
        ...

    def begin_decode(self, metadata: DecodeMetadata) -> Attend:
        """Attention of each sequence's newest token over its context."""
        ...
