"""The flash-attn package and plain torch as backends of attention on a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from executor_service.layers.attention import Attend
from executor_service.layers.cuda_attention import DecodeStep, PrefillStep, TritonAttention

FLASH_ATTN_BLOCK_SIZE = 256  # its paged cache takes multiples of this


def has_flash_attn() -> bool:
    """Whether the package is installed and can be imported."""
    try:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: F401  # pyright: ignore
    except ImportError:
        return False
    return True


class FlashAttention(TritonAttention):
    """FlashAttention 2 (arXiv:2307.08691): prefill where no context begins in the cache, and decode.

    Decode reads the cache through a strided view; a chunk behind a cached prefix is left to our own kernels.
    """

    def begin_prefill(self, step: PrefillStep) -> Attend:
        """See CudaAttention."""
        if step.has_cached:
            return super().begin_prefill(step)
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        def attend(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor) -> Tensor:
            starts, longest = step.query_starts, step.longest_chunk
            return flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True)

        return self.behind_store(step.positions, step.slot_mapping, attend)

    def begin_decode(self, step: DecodeStep) -> Attend:
        """See CudaAttention."""
        from flash_attn import flash_attn_with_kvcache  # pyright: ignore[reportMissingImports]

        inputs = step.inputs
        block_table = self.block_tables[inputs.row_slots.clamp(min=0)]

        def attend(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor) -> Tensor:
            keys, values = (kv_cache[:, :, half].transpose(1, 2) for half in (0, 1))
            out = flash_attn_with_kvcache(
                q[:, None], keys, values, cache_seqlens=inputs.context_lens, block_table=block_table, causal=True
            )
            assert isinstance(out, Tensor)
            return out

        return self.behind_store(inputs.positions, inputs.slot_mapping, attend)


class TorchAttention(TritonAttention):
    """Gathers each context and leaves the rest to PyTorch: slow, for comparison, and never captured."""

    def begin_prefill(self, step: PrefillStep) -> Attend:
        """See CudaAttention."""
        starts, lengths = step.query_starts.tolist(), step.context_lens.tolist()
        slots = step.seq_slots.clamp(min=0)

        def attend(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor) -> Tensor:
            out = torch.zeros_like(q)
            for index, length in enumerate(lengths):
                rows = slice(starts[index], starts[index + 1])
                num_queries = rows.stop - rows.start
                if num_queries:
                    keys, values = self._gather(kv_cache, slots[index : index + 1], length)
                    mask = torch.ones(num_queries, length, dtype=torch.bool, device=q.device).tril(length - num_queries)
                    queries = q[rows].transpose(0, 1)[None]
                    attended = F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)
                    out[rows] = attended[0].transpose(0, 1)
            return out

        return self.behind_store(step.positions, step.slot_mapping, attend)

    def begin_decode(self, step: DecodeStep) -> Attend:
        """See CudaAttention."""
        inputs, longest = step.inputs, step.longest_context
        slots = inputs.row_slots.clamp(min=0)
        is_visible = torch.arange(longest, device=slots.device) < inputs.context_lens[:, None]

        def attend(q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor) -> Tensor:
            keys, values = self._gather(kv_cache, slots, longest)
            keys, values = (x.masked_fill(~is_visible[:, None, :, None], 0) for x in (keys, values))  # NaN would spread
            mask = is_visible[:, None, None]
            attended = F.scaled_dot_product_attention(q[:, :, None], keys, values, mask, enable_gqa=True)
            return attended.masked_fill((inputs.context_lens == 0)[:, None, None, None], 0)

        return self.behind_store(inputs.positions, inputs.slot_mapping, attend)

    def _gather(self, kv_cache: Tensor, slots: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` positions: [len(slots), kv_heads, length, head_dim] each."""
        num_blocks = -(-length // self.config.block_size)
        blocks = kv_cache[self.block_tables[slots, :num_blocks]]  # [seqs, blocks, kv_heads, 2, block_size, head_dim]
        keys, values = blocks.permute(3, 0, 2, 1, 4, 5).flatten(3, 4)[:, :, :, :length]
        return keys, values
