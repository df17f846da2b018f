"""Attention on a GPU: what a step tells it, and its backends.

Everything lives on the device; the host knows only upper bounds, so that a step can be captured in a CUDA graph.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from executor_service.layers.attention import Attend, AttentionConfig, HeadParameters
from kernels.gpu.decode_attention import Workspace, paged_decode_attention
from kernels.gpu.decode_split import Split
from kernels.gpu.prefill_attention import CONFIGS, num_tiles, paged_prefill_attention
from kernels.gpu.qk_norm_rope import qk_norm_rope_store
from kernels.gpu.step_rings import DecodeInputs


@dataclasses.dataclass(frozen=True)
class PrefillStep:
    """The prompt chunks of a step, one after the other; rows past the last chunk are padding."""

    positions: Tensor  # [num_tokens] int32
    slot_mapping: Tensor  # [num_tokens] int32: block * block_size + offset, -1 = padding
    query_starts: Tensor  # [num_seqs + 1] int32
    context_lens: Tensor  # [num_seqs] int32, tokens visible after the chunk; 0 = padding
    seq_slots: Tensor  # [num_seqs] int32, rows of block_tables
    longest_chunk: int  # tokens, an upper bound
    has_cached: bool  # whether any chunk's context begins before the chunk


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """One token each of a batch of sequences."""

    inputs: DecodeInputs
    longest_context: int  # tokens, an upper bound


class CudaAttention(Protocol):
    """Attention over the paged KV cache on a GPU."""

    @property
    def split(self) -> Split:
        """What the schedule of a decode step must be made for."""
        ...

    def begin_prefill(self, step: PrefillStep) -> Attend:
        """Causal attention of each chunk over its sequence's context; the chunk is that context's tail."""
        ...

    def begin_decode(self, step: DecodeStep) -> Attend:
        """Attention of each sequence's newest token over its context."""
        ...


class TritonAttention:
    """Our own kernels; see CudaAttention."""

    def __init__(self, config: AttentionConfig, block_tables: Tensor, max_model_len: int, workspace: Workspace) -> None:
        """block_tables: [num_slots, max_blocks] int32, of every slot."""
        self.config = config
        self.block_tables = block_tables
        self._workspace = workspace
        angles = torch.arange(max_model_len, device=block_tables.device)[:, None].float() * config.inv_freq
        self._rope_table = torch.cat((angles.cos(), angles.sin()), dim=-1)  # [max_model_len, head_dim] float32

    @property
    def split(self) -> Split:
        """See CudaAttention."""
        return self._workspace.split

    def begin_prefill(self, step: PrefillStep) -> Attend:
        """See CudaAttention."""
        config = CONFIGS[self.config.dtype]
        group = self.config.num_heads // self.config.num_kv_heads
        max_tiles = num_tiles(len(step.positions), len(step.context_lens), group, config)

        def attend(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor) -> Tensor:
            return paged_prefill_attention(
                q, kv_cache, step.query_starts, step.context_lens, step.seq_slots, self.block_tables, max_tiles, config
            )

        return self.behind_store(step.positions, step.slot_mapping, attend)

    def begin_decode(self, step: DecodeStep) -> Attend:
        """See CudaAttention."""
        inputs = step.inputs

        def attend(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor) -> Tensor:
            return paged_decode_attention(
                q,
                kv_cache,
                self.block_tables,
                inputs.row_slots,
                inputs.context_lens,
                inputs.schedule,
                self._workspace,
            )

        return self.behind_store(inputs.positions, inputs.slot_mapping, attend)

    def behind_store(
        self, positions: Tensor, slot_mapping: Tensor, attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    ) -> Attend:
        """Let `attend(q, k, v, kv_cache)` find queries and keys normalized and rotated, and the cache written.

        q: [n, heads, head_dim]; k, v: [n, kv_heads, head_dim], all views of the projection.
        """
        config = self.config
        num_rotated = config.num_heads + config.num_kv_heads

        def store_and_attend(qkv: Tensor, parameters: HeadParameters, kv_cache: Tensor) -> Tensor:
            norms = parameters.qk_norm
            q_norm, k_norm = (None, None) if norms is None else (norms[0], norms[-1])
            qk_norm_rope_store(
                qkv,
                positions,
                slot_mapping,
                self._rope_table,
                kv_cache,
                q_norm,
                k_norm,
                parameters.bias,
                config.norm_eps,
                config.num_heads,
                config.num_kv_heads,
            )
            heads = qkv.view(len(qkv), -1, config.head_dim)
            q, k, v = heads[:, : config.num_heads], heads[:, config.num_heads : num_rotated], heads[:, num_rotated:]
            return attend(q, k, v, kv_cache).reshape(len(qkv), -1)

        return store_and_attend
