"""The paged KV cache: how many blocks, and where they lie."""

import dataclasses
import mmap
from pathlib import Path

import torch
from torch import Tensor

from executor_service.weights.errors import UnfitSettings

_CGROUP = Path("/sys/fs/cgroup")  # within a container, the container's own cgroup


@dataclasses.dataclass(frozen=True)
class KVCacheShape:
    """What one block holds: keys and values of `block_size` tokens in every layer."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, over all layers."""
        return self.num_layers * self.num_kv_heads * 2 * self.block_size * self.head_dim * self.dtype.itemsize


def count_blocks(
    shape: KVCacheShape, memory_bytes: int, max_num_seqs: int, max_model_len: int, memory_flag: str
) -> int:
    """How many blocks `memory_bytes` hold, but no more than `max_num_seqs` longest sequences can use.

    memory_flag: the one to raise for more of them. Raises: UnfitSettings, where that is less than one longest sequence.
    """
    blocks_per_sequence = -(-max_model_len // shape.block_size)
    num_blocks = min(memory_bytes // shape.block_bytes, max_num_seqs * blocks_per_sequence)
    if num_blocks < blocks_per_sequence:
        needed_mib = blocks_per_sequence * shape.block_bytes / 2**20
        raise UnfitSettings(
            f"the KV cache may take {max(memory_bytes, 0) / 2**20:.0f} MiB, but one sequence of {max_model_len} tokens "
            f"needs {needed_mib:.0f} MiB: lower --max-model-len, raise {memory_flag} or set --num-blocks"
        )
    return num_blocks


def allocate_on_cpu(shape: KVCacheShape, num_blocks: int) -> list[Tensor]:
    """Zeroed caches, one a layer: [num_blocks, num_kv_heads, 2, block_size, head_dim]."""
    # Zeroed, because attention multiplies what it masks by 0, and 0 * NaN is NaN. Fresh pages are zero, and unlike
    # those that torch.zeros has written to they cost no memory until a block is used.
    size = (num_blocks, shape.num_kv_heads, 2, shape.block_size, shape.head_dim)
    num_bytes = num_blocks * shape.block_bytes // shape.num_layers
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return [
        torch.frombuffer(mmap.mmap(-1, num_bytes, flags=private), dtype=shape.dtype).view(size)
        for _ in range(shape.num_layers)
    ]


def available_memory_bytes() -> int:
    """Bytes of main memory that this machine and our cgroup can give to new allocations without swapping."""
    machine_bytes, cgroup_bytes = _machine_memory_bytes(), _cgroup_memory_bytes()
    return machine_bytes if cgroup_bytes is None else min(machine_bytes, cgroup_bytes)


def _machine_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value, *_ = line.split()
        if name == "MemAvailable:":
            return int(value) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line")


def _cgroup_memory_bytes() -> int | None:
    """What is left of the limit of cgroup v2; None without one."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
    except FileNotFoundError:
        return None
    if limit == "max":
        return None
    return max(int(limit) - int((_CGROUP / "memory.current").read_text()), 0)
