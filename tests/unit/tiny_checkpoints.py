"""Tiny models with random weights, written as transformers writes them, and a paged runner of our model beside it."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from executor_service.layers.attention import DecodeMetadata, PrefillMetadata
from executor_service.layers.cpu import CpuAttention, CpuOps
from executor_service.models import CausalLM, load_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


def tiny_config(architecture: str, **changes: Any) -> transformers.PretrainedConfig:
    """Two layers, 64 wide; `changes` are fields of the transformers config."""
    fields = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    if architecture == "Qwen2ForCausalLM":
        del fields["head_dim"]
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    return config_class(**(fields | changes))


def save_tiny_model(
    directory: Path, architecture: str, *, max_shard_size: str = "1GB", **changes: Any
) -> transformers.PreTrainedModel:
    """Write a model whose every parameter is random, biases and norms too; returns transformers' own."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(tiny_config(architecture, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def edit_config(directory: Path, *removed: str, **changes: Any) -> None:
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if name not in removed}))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_model(directory, dtype=dtype, device_ops=CpuOps())


class PagedRun:
    """One batch of sequences in a paged cache of small blocks that lie in no order."""

    BLOCK_SIZE = 8

    def __init__(
        self, model: CausalLM, num_seqs: int, dtype: torch.dtype = torch.float32, max_blocks: int = 20
    ) -> None:
        config = model.config
        self.model = model
        permutation = torch.randperm(num_seqs * max_blocks, generator=torch.Generator().manual_seed(0))
        self.block_tables = permutation.int().view(num_seqs, max_blocks)
        attention = model.attention_config(self.BLOCK_SIZE)
        cache_shape = (num_seqs * max_blocks, attention.num_kv_heads, 2, self.BLOCK_SIZE, config.head_dim)
        self.kv_caches = [torch.zeros(cache_shape, dtype=dtype) for _ in range(config.num_layers)]
        self.attention = CpuAttention(attention)
        self.context_lens = [0] * num_seqs

    @torch.inference_mode()
    def prefill(self, chunks: list[Tensor]) -> list[Tensor]:
        """chunks: the next token ids of each sequence; returns their logits, [count, vocab_size] each."""
        starts, counts = self.context_lens, [len(chunk) for chunk in chunks]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        positions = [torch.arange(start, end) for start, end in zip(starts, ends, strict=True)]
        query_starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
        metadata = PrefillMetadata(torch.cat(positions), tuple(query_starts), tuple(ends), self.block_tables)
        attend = self.attention.begin_prefill(metadata)
        hidden = self.model.forward(torch.cat(chunks), self.kv_caches, attend)
        self.context_lens = ends
        return list(self.model.compute_logits(hidden).float().split(counts))

    @torch.inference_mode()
    def decode(self, token_ids: Tensor) -> Tensor:
        """token_ids: [num_seqs]; returns [num_seqs, vocab_size]."""
        positions = torch.tensor(self.context_lens)
        attend = self.attention.begin_decode(DecodeMetadata(positions, self.block_tables))
        hidden = self.model.forward(token_ids, self.kv_caches, attend)
        self.context_lens = (positions + 1).tolist()
        return self.model.compute_logits(hidden).float()
