"""Whole steps of the library in C against transformers and against eager PyTorch, at every level of processor.

Tiny models, whose logits have a standard deviation of about 5: 1e-4 is a relative error of 2e-5.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from executor_service.layers.attention import DecodeMetadata, PrefillMetadata
from executor_service.layers.cpu import PanelOps
from executor_service.models import load_model
from executor_service.runner.cpu_steps import EngineSteps
from executor_service.runner.step_inputs import DecodeInputs, PrefillInputs
from kernels.cpu.engine import Engine
from kernels.cpu.library import DTYPE_FORMATS, Format, Library
from tests.unit.test_models import LENGTHS, VARIANTS, expected_logits, prompts
from tests.unit.tiny_checkpoints import PagedRun, load, save_tiny_model

TOLERANCE: dict[str, Any] = {"rtol": 0, "atol": 2e-4}


class EngineRun:
    """One batch of sequences in a paged cache of small blocks that lie in no order; as PagedRun, by the library."""

    BLOCK_SIZE, MAX_BLOCKS = 8, 20

    def __init__(
        self,
        library: Library,
        directory: Path,
        num_seqs: int,
        dtype: torch.dtype = torch.float32,
        weight_format: Format | None = None,
        num_threads: int = 2,
    ) -> None:
        ops = PanelOps(library, weight_format or DTYPE_FORMATS[dtype])
        model = load_model(directory, dtype=dtype, device_ops=ops)
        num_blocks = num_seqs * self.MAX_BLOCKS
        permutation = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
        self.block_tables = permutation.int().view(num_seqs, self.MAX_BLOCKS)
        config = model.config
        shape = (num_blocks, config.num_kv_heads, 2, self.BLOCK_SIZE, config.head_dim)
        # Nobody may read what was never written.
        self.kv_caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(config.num_layers)]
        self.steps = EngineSteps(library, model, self.kv_caches, 512, [0] * num_threads)
        self.context_lens = [0] * num_seqs

    def prefill(self, chunks: list[Tensor]) -> list[Tensor]:
        """chunks: the next token ids of each sequence; returns their logits, [count, vocab_size] each."""
        counts = [len(chunk) for chunk in chunks]
        ends = [start + count for start, count in zip(self.context_lens, counts, strict=True)]
        positions = [torch.arange(start, end) for start, end in zip(self.context_lens, ends, strict=True)]
        query_starts = (0, *torch.tensor(counts).cumsum(0).tolist())
        nothing = torch.empty(0, dtype=torch.int64)
        metadata = PrefillMetadata(torch.cat(positions), query_starts, tuple(ends), self.block_tables)
        inputs = PrefillInputs(torch.cat(chunks), metadata, nothing, nothing, nothing, nothing)
        self.context_lens = ends
        return list(self.steps.prefill(inputs)(torch.arange(sum(counts))).split(counts))

    def decode(self, token_ids: Tensor) -> Tensor:
        """token_ids: [num_seqs]; returns [num_seqs, vocab_size]."""
        positions = torch.tensor(self.context_lens)
        metadata = DecodeMetadata(positions, self.block_tables)
        self.context_lens = (positions + 1).tolist()
        return self.steps.decode(DecodeInputs(token_ids.contiguous(), metadata))


def generated() -> Tensor:
    return torch.randint(96, (len(LENGTHS), 6), generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=VARIANTS, scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A directory, and transformers' model in it."""
    architecture, changes = VARIANTS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    return directory, save_tiny_model(directory, architecture, **changes)


def test_prefill_and_decode_give_transformers_logits_in_every_architecture(library: Library, saved):
    directory, theirs = saved
    run = EngineRun(library, directory, len(LENGTHS))
    actual = [[logits] for logits in run.prefill(prompts())]
    for column in generated().T:
        for parts, logits in zip(actual, run.decode(column), strict=True):
            parts.append(logits[None])
    whole = [torch.cat(parts) for parts in zip(prompts(), generated(), strict=True)]
    for parts, token_ids in zip(actual, whole, strict=True):
        torch.testing.assert_close(torch.cat(parts), expected_logits(theirs, token_ids), **TOLERANCE)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_chunks_of_a_prompt_give_transformers_logits_with_large_heads(library: Library, head_dim: int, tmp_path: Path):
    theirs = save_tiny_model(tmp_path, "Qwen3ForCausalLM", head_dim=head_dim)
    (prompt,) = [prompt for prompt in prompts() if len(prompt) == max(LENGTHS)]
    run = EngineRun(library, tmp_path, 1)
    parts = [run.prefill([part])[0] for part in prompt.split([1, 63, 2, 33, 1])]
    torch.testing.assert_close(torch.cat(parts), expected_logits(theirs, prompt), **TOLERANCE)


def test_bfloat16_follows_float32_as_closely_as_eager_bfloat16_does(library: Library, saved):
    directory, theirs = saved
    exact = torch.cat([expected_logits(theirs, prompt) for prompt in prompts()])
    eager_run = PagedRun(load(directory, torch.bfloat16), len(LENGTHS), torch.bfloat16)
    actual = torch.cat(EngineRun(library, directory, len(LENGTHS), torch.bfloat16).prefill(prompts()))
    eager = torch.cat(eager_run.prefill(prompts()))
    assert (actual - exact).square().mean() < 1.2 * (eager - exact).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_weights_leave_logits_within_a_hundredth_of_their_variance(
    library: Library, dtype: torch.dtype, tmp_path: Path
):
    theirs = save_tiny_model(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    exact = torch.cat([expected_logits(theirs, prompt) for prompt in prompts()])
    actual = torch.cat(EngineRun(library, tmp_path, len(LENGTHS), dtype, Format.INT8).prefill(prompts()))
    assert (actual - exact).square().mean() < 0.01 * exact.var()


@pytest.mark.parametrize(
    "weight_format", [Format.FLOAT, Format.BF16, Format.INT8], ids=lambda value: value.name.lower()
)
def test_a_steps_logits_are_those_of_one_thread_whatever_their_number(
    library: Library, weight_format: Format, tmp_path: Path
):
    save_tiny_model(tmp_path, "LlamaForCausalLM")
    dtype = torch.bfloat16 if weight_format is Format.BF16 else torch.float32
    results = []
    for num_threads in (1, 2, 5):
        run = EngineRun(library, tmp_path, len(LENGTHS), dtype, weight_format, num_threads)
        results.append(torch.cat([*run.prefill(prompts()), run.decode(torch.arange(len(LENGTHS)))]))
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_forty_sequences_decode_as_they_do_alone(library: Library, tmp_path: Path):
    save_tiny_model(tmp_path, "LlamaForCausalLM")
    token_ids = torch.arange(40)
    together = EngineRun(library, tmp_path, 40)
    together.prefill([token_ids[i : i + 1] for i in range(40)])
    logits = together.decode(token_ids)
    for i in (0, 13, 39):
        alone = EngineRun(library, tmp_path, 1)
        alone.prefill([token_ids[i : i + 1]])
        assert torch.equal(alone.decode(token_ids[i : i + 1])[0], logits[i])


def test_a_size_that_no_panel_fits_is_refused_when_the_engine_is_made(library: Library, tmp_path: Path):
    save_tiny_model(tmp_path, "LlamaForCausalLM", intermediate_size=104)
    with pytest.raises(ValueError, match="multiple of 16"):
        EngineRun(library, tmp_path, 1)


def test_an_engine_that_was_closed_can_be_closed_again(library: Library, tmp_path: Path):
    save_tiny_model(tmp_path, "LlamaForCausalLM")
    engine: Engine = EngineRun(library, tmp_path, 1).steps._engine
    engine.close()
    engine.close()
