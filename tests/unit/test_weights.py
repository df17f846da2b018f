"""What is refused when a model is loaded, each with one sentence that names the cause; and the digest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from executor_service.weights import InvalidCheckpoint, InvalidConfig, ModelError, UnsupportedModel, digest, errors
from executor_service.weights.checkpoint import Checkpoint, Span
from tests.unit.tiny_checkpoints import edit_config, load, save_tiny_model


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    save_tiny_model(directory, "LlamaForCausalLM")
    return directory


@pytest.fixture(scope="module")
def sound_shards(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    save_tiny_model(directory, "LlamaForCausalLM", max_shard_size="60KB")
    return directory


@pytest.fixture
def model(sound, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture
def sharded(sound_shards, tmp_path) -> Path:
    """A copy in several files, to be damaged."""
    return Path(shutil.copytree(sound_shards, tmp_path / "sharded"))


def edit_tensors(directory: Path, *removed: str, **changes: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name in removed:
        del tensors[name]
    save_file(tensors | changes, path)


def assert_refused(directory: Path, error: type[ModelError], *words: str) -> None:
    with pytest.raises(error) as caught:
        load(directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_sound_model_is_loaded(model, sharded):
    load(model)
    load(sharded)


def test_unsupported_architecture_is_named_beside_those_supported(model):
    edit_config(model, architectures=["MixtralForCausalLM"])
    assert_refused(model, UnsupportedModel, "MixtralForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM")


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [3]])
def test_config_without_architectures_is_refused(model, architectures):
    edit_config(model, architectures=architectures)
    assert_refused(model, InvalidConfig, "architectures")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000, None])
def test_missing_or_broken_config_is_refused(model, content):
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_bytes(content)
    assert_refused(model, InvalidConfig, "config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "64"),
        ("hidden_size", None),
        ("vocab_size", 1.5),
        ("num_hidden_layers", True),
        ("num_attention_heads", -4),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("max_position_embeddings", None),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "no"),
        ("max_window_layers", "all"),
        ("rope_parameters", 7),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -1}),
        ("rope_parameters", {"rope_type": ["linear"]}),
    ],
)
def test_config_with_a_value_of_no_use_is_refused_by_its_name(model, field, value):
    edit_config(model, **({"use_sliding_window": True, "sliding_window": 8} | {field: value}))
    assert_refused(model, InvalidConfig, field.removeprefix("num_").split("_")[0])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "dynamic"),
        ({"partial_rotary_factor": 0.5}, "part"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"layer_types": None, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding"),
    ],
)
def test_what_is_not_implemented_is_refused_by_its_name(model, changes, word):
    edit_config(model, **changes)
    assert_refused(model, UnsupportedModel, word)


def test_a_sliding_window_that_no_layer_uses_is_no_obstacle(model):
    edit_config(model, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    load(model)


def test_missing_tensor_is_named(model):
    edit_tensors(model, "model.layers.1.mlp.up_proj.weight")
    assert_refused(model, InvalidCheckpoint, "model.layers.1.mlp.up_proj.weight")


def test_unknown_tensor_is_named(model):
    edit_tensors(model, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    assert_refused(model, InvalidCheckpoint, "model.layers.0.self_attn.q_proj.bias")


def test_tensors_that_old_files_hold_for_no_use_are_ignored(model):
    edit_config(model, tie_word_embeddings=True)
    edit_tensors(model, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    load(model)


@pytest.mark.parametrize("shape", [(64, 63), (4096,), (64, 64, 1), (128, 32)])
def test_wrong_shape_is_refused_with_both_shapes(model, shape):
    edit_tensors(model, **{"model.layers.0.self_attn.o_proj.weight": torch.zeros(shape)})
    assert_refused(model, InvalidCheckpoint, "model.layers.0.self_attn.o_proj.weight", str(list(shape)), "[64, 64]")


def test_config_that_promises_more_than_memory_holds_is_refused_before_any_copy(model):
    edit_config(model, hidden_size=2**40, vocab_size=2**50)
    assert_refused(model, InvalidCheckpoint, "model.embed_tokens.weight")


def test_tensor_of_integers_is_refused(model):
    edit_tensors(model, **{"model.norm.weight": torch.ones(64, dtype=torch.int32)})
    assert_refused(model, InvalidCheckpoint, "model.norm.weight", "I32")


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
def test_truncated_safetensors_are_refused(model, kept):
    path = model / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    assert_refused(model, InvalidCheckpoint, "model.safetensors")


def test_directory_without_weights_is_refused(model):
    (model / "model.safetensors").unlink()
    assert_refused(model, InvalidCheckpoint, "model.safetensors")


def test_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(sharded, InvalidCheckpoint, shard.name)


@pytest.mark.parametrize("weight_map", [None, {}, [1], {"x": 3}, {"x": "a.bin"}])
def test_broken_index_is_refused(sharded, weight_map):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(sharded, InvalidCheckpoint, "index.json")


def test_index_that_names_a_file_of_another_directory_is_refused(sharded, model):
    weight_map = dict.fromkeys(load_file(model / "model.safetensors"), "../model/model.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(sharded, InvalidCheckpoint, "../model/model.safetensors")


def test_tensor_in_two_shards_is_refused(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    assert_refused(sharded, InvalidCheckpoint, second.name)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("span", [Span(0, 2, 2), Span(1, 3, 4), Span(3, 3, 2)], ids=["whole", "padded", "empty"])
def test_a_span_of_a_tensor_is_followed_by_zeros(span, dim, tmp_path, monkeypatch):
    whole = torch.arange(1.0, 10).view(3, 3)
    save_file({"weight": whole}, tmp_path / "model.safetensors")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))
    with Checkpoint(tmp_path, torch.float32, torch.device("cpu")) as checkpoint:
        part = checkpoint.take("weight", (3, 3), span, dim=dim)
    held = whole.narrow(dim, span.start, span.stop - span.start)
    zeros = torch.zeros_like(whole).narrow(dim, 0, span.length - held.shape[dim])
    assert torch.equal(part, torch.cat([held, zeros], dim))


def test_digest_is_over_the_contents_in_name_order(model, sharded):
    assert digest(model) == xxhash.xxh3_128_hexdigest((model / "model.safetensors").read_bytes())
    contents = [path.read_bytes() for path in sorted(sharded.glob("*.safetensors"))]
    assert digest(sharded) == xxhash.xxh3_128_hexdigest(b"".join(contents))


def test_digest_changes_with_one_bit(model):
    before = digest(model)
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert digest(model) != before


def test_every_error_is_in_the_documented_tree():
    for error in (ModelError, *ModelError.__subclasses__()):
        assert error.__name__ in (errors.__doc__ or "")
