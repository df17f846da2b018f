"""Our models against transformers', on tiny random weights: logits within 1e-4 in float32.

The logits' standard deviation is about 5, so that 1e-4 is a relative error of 2e-5.
"""

import pytest
import torch
from torch import Tensor

from executor_service.models import registry
from tests.unit.tiny_checkpoints import LINEAR, LLAMA3, PagedRun, edit_config, load, save_tiny_model

TOLERANCE = {"rtol": 0, "atol": 1e-4}
LENGTHS = [1, 8, 37, 100]
VARIANTS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-no-gqa": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("LlamaForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "llama-llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 8}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-tied-biases-wide": (
        "Qwen3ForCausalLM",
        {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 32},
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=VARIANTS, scope="module")
def pair(request, tmp_path_factory):
    """A model of ours and transformers' of the same weights."""
    architecture, changes = VARIANTS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    theirs = save_tiny_model(directory, architecture, **changes)
    return load(directory), theirs


def prompts(vocab_size: int = 96) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in LENGTHS]


@torch.inference_mode()
def expected_logits(theirs, prompt: Tensor) -> Tensor:
    return theirs(prompt[None]).logits[0].float()


def assert_logits(actual: list[Tensor], theirs, token_ids: list[Tensor]) -> None:
    for logits, prompt in zip(actual, token_ids, strict=True):
        expected = expected_logits(theirs, prompt)
        assert expected.std() > 0.5
        torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_prefill_in_one_go_gives_transformers_logits(pair):
    ours, theirs = pair
    assert_logits(PagedRun(ours, len(LENGTHS)).prefill(prompts()), theirs, prompts())


def test_prefill_in_chunks_gives_transformers_logits(pair):
    ours, theirs = pair
    token_ids = [prompt for prompt in prompts() if len(prompt) > 8]
    run = PagedRun(ours, len(token_ids))
    parts = [run.prefill([prompt[start:end] for prompt in token_ids]) for start, end in [(0, 3), (3, 16), (16, 17)]]
    parts.append(run.prefill([prompt[17:] for prompt in token_ids]))
    assert_logits([torch.cat(chunks) for chunks in zip(*parts, strict=True)], theirs, token_ids)


def test_decode_of_a_ragged_batch_gives_transformers_logits(pair):
    ours, theirs = pair
    run = PagedRun(ours, len(LENGTHS))
    generated = torch.randint(96, (len(LENGTHS), 10), generator=torch.Generator().manual_seed(2))
    run.prefill(prompts())
    decoded = torch.stack([run.decode(column) for column in generated.T], dim=1)
    whole = [torch.cat(parts) for parts in zip(prompts(), generated, strict=True)]
    for logits, token_ids in zip(decoded, whole, strict=True):
        torch.testing.assert_close(logits, expected_logits(theirs, token_ids)[-10:], **TOLERANCE)


def test_sharded_safetensors_give_the_same_logits(tmp_path):
    theirs = save_tiny_model(tmp_path, "Qwen3ForCausalLM", max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_logits(PagedRun(load(tmp_path), len(LENGTHS)).prefill(prompts()), theirs, prompts())


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3], ids=lambda rope: rope["rope_type"])
def test_config_as_transformers_4_wrote_it_gives_the_same_logits(rope, tmp_path):
    theirs = save_tiny_model(tmp_path, "LlamaForCausalLM", rope_parameters=rope, tie_word_embeddings=True)
    scaling = {("type" if rope is LINEAR and name == "rope_type" else name): value for name, value in rope.items()}
    edit_config(tmp_path, "rope_parameters", rope_theta=scaling.pop("rope_theta"), rope_scaling=scaling)
    assert_logits(PagedRun(load(tmp_path), len(LENGTHS)).prefill(prompts()), theirs, prompts())


def test_head_dim_is_derived_where_config_has_none(tmp_path):
    theirs = save_tiny_model(tmp_path, "LlamaForCausalLM")
    edit_config(tmp_path, "head_dim")
    assert_logits(PagedRun(load(tmp_path), len(LENGTHS)).prefill(prompts()), theirs, prompts())


def test_bfloat16_follows_float32_as_closely_as_transformers_bfloat16_does(tmp_path):
    theirs = save_tiny_model(tmp_path, "LlamaForCausalLM")
    run = PagedRun(load(tmp_path, torch.bfloat16), len(LENGTHS), torch.bfloat16)
    actual = torch.cat(run.prefill(prompts()))
    exact = torch.cat([expected_logits(theirs, prompt) for prompt in prompts()])
    rounded = torch.cat([expected_logits(theirs.bfloat16(), prompt) for prompt in prompts()])
    assert (actual - exact).square().mean() < 1.5 * (rounded - exact).square().mean()


def test_registry_holds_the_three_architectures():
    assert set(registry) == {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
