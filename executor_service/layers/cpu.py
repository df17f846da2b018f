"""The CPU as a device."""

import dataclasses

import torch
from torch import Tensor

from executor_service.layers.attention import Attend, AttentionConfig, DecodeMetadata, HeadParameters, PrefillMetadata
from executor_service.layers.device import Linear
from executor_service.layers.parallel import TensorParallel
from executor_service.layers.rotary import rotation_factors
from kernels.cpu import eager, eager_attention
from kernels.cpu.library import Format, Library
from kernels.cpu.panels import Arena, PanelLinear


class CpuOps:
    """See DeviceOps."""

    device = torch.device("cpu")

    def __init__(self, parallel: TensorParallel | None = None) -> None:
        """parallel: None for one rank."""
        self._parallel = parallel or TensorParallel()

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Packs the weight for oneDNN."""
        return eager.pack_linear(weight, bias)

    def norm_linear(
        self, linear: Linear, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See DeviceOps."""
        if x is None:
            return linear(eager.rms_norm(residual, weight, eps)), residual
        return linear(eager.add_rms_norm(self._parallel.all_reduce(x), residual, weight, eps)), residual

    def norm_gate_up(
        self, linear: Linear, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See DeviceOps."""
        gate_up, residual = self.norm_linear(linear, x, residual, weight, eps)
        return eager.silu_and_mul(gate_up), residual


class PanelOps(CpuOps):
    """See DeviceOps; linear layers are packed for the library in C, whose engine runs whole steps with them."""

    def __init__(self, library: Library, weight_format: Format) -> None:
        """weight_format: of all linear layers."""
        super().__init__()
        self._library, self._weight_format = library, weight_format
        self._arena = Arena()

    def linear(self, weight: Tensor, bias: Tensor | None) -> PanelLinear:
        """See DeviceOps."""
        return PanelLinear(self._library, weight, bias, self._weight_format, self._arena)


@dataclasses.dataclass(frozen=True)
class CpuAttention:
    """See AttentionBackend."""

    config: AttentionConfig

    def begin_prefill(self, metadata: PrefillMetadata) -> Attend:
        """See AttentionBackend."""
        config = self.config
        counts = torch.tensor(metadata.query_starts).diff()
        sequences = torch.arange(len(counts)).repeat_interleave(counts)
        rows = self._cache_rows(metadata.block_tables, sequences, metadata.positions)
        chunks = eager_attention.plan_prefill(
            metadata.query_starts,
            metadata.context_lens,
            metadata.block_tables,
            config.num_kv_heads,
            config.block_size,
            config.dtype,
        )
        factors = rotation_factors(metadata.positions, config.inv_freq, config.dtype)

        def attend(qkv: Tensor, parameters: HeadParameters, kv_cache: Tensor) -> Tensor:
            q, k, v = self._heads(qkv, parameters, factors)
            eager_attention.store_kv(k, v, kv_cache, rows)
            return eager_attention.prefill_attention(q, k, v, kv_cache, chunks).reshape(len(qkv), -1)

        return attend

    def begin_decode(self, metadata: DecodeMetadata) -> Attend:
        """See AttentionBackend."""
        config = self.config
        context_lens = (metadata.positions + 1).int()
        rows = self._cache_rows(metadata.block_tables, torch.arange(len(context_lens)), metadata.positions)
        plan = eager_attention.plan_decode(
            metadata.block_tables, context_lens, config.num_kv_heads, config.block_size, config.dtype
        )
        factors = rotation_factors(metadata.positions, config.inv_freq, config.dtype)

        def attend(qkv: Tensor, parameters: HeadParameters, kv_cache: Tensor) -> Tensor:
            q, k, v = self._heads(qkv, parameters, factors)
            eager_attention.store_kv(k, v, kv_cache, rows)
            return eager_attention.decode_attention(q, kv_cache, plan).reshape(len(qkv), -1)

        return attend

    def _cache_rows(self, block_tables: Tensor, sequences: Tensor, positions: Tensor) -> Tensor:
        """See cache_rows; sequences: [n] int64, rows of block_tables; positions: [n] int64."""
        block_size = self.config.block_size
        blocks = block_tables[sequences, positions // block_size].long()
        slot_mapping = blocks * block_size + positions % block_size
        return eager_attention.cache_rows(slot_mapping, self.config.num_kv_heads, block_size)

    def _heads(
        self, qkv: Tensor, parameters: HeadParameters, factors: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, ready to be stored: [n, heads or kv_heads, head_dim]."""
        num_heads, num_rotated = self.config.num_heads, self.config.num_heads + self.config.num_kv_heads
        if parameters.bias is not None:
            qkv += parameters.bias
        heads = qkv.view(qkv.shape[0], -1, self.config.head_dim)
        qk = heads[:, :num_rotated]
        if parameters.qk_norm is not None:
            qk = eager.rms_norm(qk, parameters.qk_norm, self.config.norm_eps)
        qk = eager.rope(qk, *factors)
        return qk[:, :num_heads], qk[:, num_heads:], heads[:, num_rotated:]
