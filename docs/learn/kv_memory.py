"""Counts the bytes of a KV cache by hand and by the program: `python -m docs.learn.kv_memory [MODEL]`."""

import json
import sys
from collections.abc import Sequence

import torch

from docs.learn.plans import model_directory
from executor_service.models import registry
from executor_service.runner.kv_cache import KVCacheShape, allocate_on_cpu, count_blocks

BLOCK_SIZE = 64  # tokens, the default
MEMORY_BYTES = 2 * 2**30
MAX_NUM_SEQS = 64  # the default on a CPU


def main(argv: Sequence[str]) -> None:
    """Print both counts, and what a given memory holds."""
    fields = json.loads((model_directory(argv) / "config.json").read_text())
    layers, kv_heads = fields["num_hidden_layers"], fields["num_key_value_heads"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    by_hand = 2 * layers * kv_heads * head_dim * 2
    print(f"by hand: 2 (K and V) x {layers} layers x {kv_heads} KV heads x {head_dim} numbers x 2 bytes (bfloat16)")
    print(f"         = {by_hand} bytes a token, {by_hand * BLOCK_SIZE} a block of {BLOCK_SIZE} tokens")

    config = registry[fields["architectures"][0]].read_config(fields)
    shape = KVCacheShape(config.num_layers, config.num_kv_heads, BLOCK_SIZE, config.head_dim, torch.bfloat16)
    kv_caches = allocate_on_cpu(shape, 100)
    print(f"program: {shape.block_bytes} bytes a block")
    print(f"         100 blocks are {len(kv_caches)} tensors of {list(kv_caches[0].shape)},")
    print(f"         {sum(kv_cache.nbytes for kv_cache in kv_caches)} bytes in all")

    longest = config.max_position_embeddings
    num_blocks = count_blocks(shape, MEMORY_BYTES, MAX_NUM_SEQS, longest, "--memory-utilization")
    all_blocks = MAX_NUM_SEQS * longest // BLOCK_SIZE
    print(f"2 GiB:   {num_blocks} blocks, {num_blocks * BLOCK_SIZE} tokens")
    print(f"         {MAX_NUM_SEQS} sequences of {longest} tokens would need {all_blocks} blocks, ", end="")
    print(f"{all_blocks * shape.block_bytes / 2**30:.1f} GiB")


if __name__ == "__main__":
    main(sys.argv[1:])
