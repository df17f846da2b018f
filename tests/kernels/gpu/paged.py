"""Random paged caches for the tests of attention: what no kernel may read is NaN, in the cache and in the output."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


@dataclasses.dataclass(frozen=True)
class Shape:
    block_size: int = 16
    num_kv_heads: int = 2
    group: int = 2  # query heads a kv head
    head_dim: int = 64

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


@dataclasses.dataclass
class Paged:
    """Sequences with random keys and values, scattered over a cache whose other cells are NaN; on the CPU."""

    shape: Shape
    context_lens: list[int]
    kv_cache: torch.Tensor  # [num_blocks, kv_heads, 2, block_size, head_dim]
    block_tables: torch.Tensor  # [num_slots, max_blocks] int32, what is unused names no block
    slots: torch.Tensor  # [num_seqs] int32, -1 for an empty sequence
    generator: torch.Generator

    @classmethod
    def random(cls, shape: Shape, context_lens: list[int], dtype: torch.dtype, seed: int = 0) -> "Paged":
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // shape.block_size) for length in context_lens]
        num_blocks = sum(counts) + 2
        cache_shape = (num_blocks, shape.num_kv_heads, 2, shape.block_size, shape.head_dim)
        noise = torch.randn(cache_shape, generator=generator).to(dtype)
        kv_cache = torch.full(cache_shape, torch.nan, dtype=dtype)
        num_slots = len(context_lens) + 2
        block_tables = torch.full((num_slots, max(counts) + 1), 2**30, dtype=torch.int32)
        slots = torch.randperm(num_slots, generator=generator)[: len(context_lens)].int()
        free = torch.randperm(num_blocks, generator=generator).int()
        for slot, length, blocks in zip(slots, context_lens, free.split([*counts, 2]), strict=False):
            block_tables[slot, : len(blocks)] = blocks
            for index, block in enumerate(blocks):
                used = min(shape.block_size, length - index * shape.block_size)
                kv_cache[block, :, :, :used] = noise[block, :, :, :used]
        slots[torch.tensor(context_lens) == 0] = -1
        return cls(shape, context_lens, kv_cache, block_tables, slots, generator)

    def queries(self, num_tokens: int) -> torch.Tensor:
        """[num_tokens, heads, head_dim], a strided view of the rows of a QKV projection."""
        shape = self.shape
        qkv = torch.randn(
            num_tokens, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim, generator=self.generator
        )
        return qkv.to(self.kv_cache.dtype)[:, : shape.num_heads]


def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device with its strides, which .to() would pack."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN (integers: their largest)."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
