"""The CPU as a device."""

import dataclasses

import torch
from torch import Tensor

from executor_service.layers.attention import Attend, DecodeMetadata, PrefillMetadata
from executor_service.layers.device import Linear
from kernels import cpu, cpu_attention


class CpuOps:
    """See DeviceOps."""

    device = torch.device("cpu")
    rms_norm = staticmethod(cpu.rms_norm)
    add_rms_norm = staticmethod(cpu.add_rms_norm)
    rope = staticmethod(cpu.rope)
    silu_and_mul = staticmethod(cpu.silu_and_mul)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Packs the weight for oneDNN."""
        return cpu.pack_linear(weight, bias)

    def attention(self, *, num_kv_heads: int, block_size: int, dtype: torch.dtype) -> "CpuAttention":
        """See DeviceOps."""
        return CpuAttention(num_kv_heads, block_size, dtype)


@dataclasses.dataclass(frozen=True)
class CpuAttention:
    """See AttentionBackend."""

    num_kv_heads: int
    block_size: int
    dtype: torch.dtype

    def begin_prefill(self, metadata: PrefillMetadata) -> Attend:
        """See AttentionBackend."""
        rows = cpu_attention.cache_rows(metadata.slot_mapping, self.num_kv_heads, self.block_size)
        chunks = cpu_attention.plan_prefill(
            metadata.query_starts,
            metadata.context_lens,
            metadata.block_tables,
            self.num_kv_heads,
            self.block_size,
            self.dtype,
        )

        def attend(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor) -> Tensor:
            cpu_attention.store_kv(k, v, kv_cache, rows)
            return cpu_attention.prefill_attention(q, k, v, kv_cache, chunks)

        return attend

    def begin_decode(self, metadata: DecodeMetadata) -> Attend:
        """See AttentionBackend."""
        rows = cpu_attention.cache_rows(metadata.slot_mapping, self.num_kv_heads, self.block_size)
        plan = cpu_attention.plan_decode(
            metadata.block_tables, metadata.context_lens, self.num_kv_heads, self.block_size, self.dtype
        )

        def attend(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor) -> Tensor:
            cpu_attention.store_kv(k, v, kv_cache, rows)
            return cpu_attention.decode_attention(q, kv_cache, plan)

        return attend
