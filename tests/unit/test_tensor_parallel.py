"""A model cut over ranks, each a thread here, computes what the whole one does: logits within 1e-4 in float32."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from executor_service.layers.cpu import CpuOps
from executor_service.layers.parallel import TensorParallel
from executor_service.models import CausalLM, load_model
from executor_service.weights import checkpoint
from tests.unit.rank_threads import ThreadGroup
from tests.unit.tiny_checkpoints import PagedRun, load, save_tiny_model

PROMPTS = [torch.arange(length) % 96 for length in (1, 9, 37)]
NEXT_TOKENS = torch.tensor([3, 95, 47])
THREE_GROUPS = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}
CASES = {
    "even heads": ("LlamaForCausalLM", {}, 2),
    "key-value heads on two ranks each": ("LlamaForCausalLM", {}, 4),
    "more ranks than query heads": ("LlamaForCausalLM", {}, 8),
    "three groups on two ranks": ("LlamaForCausalLM", THREE_GROUPS, 2),
    "three groups on four ranks": ("LlamaForCausalLM", THREE_GROUPS, 4),
    "a group of seven on two ranks": ("Qwen2ForCausalLM", {"hidden_size": 112, "num_attention_heads": 14}, 4),
    "biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, 2),
    "norms of queries and keys, tied": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}, 2),
    "odd sizes": ("Qwen3ForCausalLM", {"vocab_size": 97, "intermediate_size": 111}, 3),
}


def logits_of(model: CausalLM) -> Tensor:
    """Of the prompts' last tokens and of one decode step: [2 * 3, number of the rank's token ids]."""
    run = PagedRun(model, len(PROMPTS))
    prefill = run.prefill(PROMPTS)
    return torch.cat([*(rows[-1:] for rows in prefill), run.decode(NEXT_TOKENS)])


def logits_over_ranks(directory: Path, num_ranks: int, **options: Any) -> Tensor:
    group = ThreadGroup(num_ranks)

    def rank_main(rank: int) -> Tensor:
        collectives = {"all_reduce": group.all_reduce(rank), "all_gather": group.all_gather(rank)}
        parallel = TensorParallel(rank, num_ranks, **collectives, **options)
        return logits_of(load_model(directory, dtype=torch.float32, device_ops=CpuOps(parallel), parallel=parallel))

    return torch.cat(group.run(rank_main), dim=1)


@pytest.mark.parametrize("shards_embedding", [False, True], ids=["embedding whole", "embedding cut"])
@pytest.mark.parametrize(("architecture", "changes", "num_ranks"), CASES.values(), ids=CASES)
def test_ranks_together_compute_the_logits_of_one(
    architecture: str, changes: dict[str, Any], num_ranks: int, shards_embedding: bool, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path, architecture, **changes)
    expected = logits_of(load(tmp_path))
    actual = logits_over_ranks(tmp_path, num_ranks, shards_embedding=shards_embedding)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_a_rank_reads_its_part_of_the_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path, "Qwen3ForCausalLM")
    num_read = 0

    class CountedSlice:
        def __init__(self, stored: Any) -> None:
            self._stored = stored

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stored, name)

        def __getitem__(self, index: Any) -> Tensor:
            nonlocal num_read
            part = self._stored[index]
            num_read += part.numel()
            return part

    class CountedFile:
        def __init__(self, file: Any) -> None:
            self._file = file

        def keys(self) -> Any:
            return self._file.keys()

        def get_slice(self, name: str) -> CountedSlice:
            return CountedSlice(self._file.get_slice(name))

    @contextlib.contextmanager
    def counted_open(*args: Any, **options: Any) -> Iterator[CountedFile]:
        with safe_open(*args, **options) as file:
            yield CountedFile(file)

    monkeypatch.setattr(checkpoint, "safe_open", counted_open)
    load_model(tmp_path, dtype=torch.float32, device_ops=CpuOps(), parallel=TensorParallel(1, 2))
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    embedding, whole = sizes["model.embed_tokens.weight"], sum(sizes.values())
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    assert num_read == embedding + norms + (whole - embedding - norms) // 2
