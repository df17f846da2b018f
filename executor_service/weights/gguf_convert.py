"""A llama-architecture GGUF file as an ordinary Hugging Face directory, weights in bf16.

Neither torch nor transformers is needed, and only a slice of one tensor is ever held in fp32. The directory that is
written to is the caller's: publishing it whole or not at all is the caller's part too.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from executor_service.weights.gguf_tokenizer import InvalidGguf, metadata, write_tokenizer

MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")

_ROWS_AT_ONCE = 2048
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, directory: Path, on_bytes: Callable[[int], object]) -> None:
    """Write `MODEL_FILES` of the GGUF file `source` into the existing, empty `directory`, each flushed to the disk.

    `on_bytes` is told of every piece of weights written, in bytes of `weight_bytes(source)` altogether.
    Raises: InvalidGguf where the file is not one, or not of the kind that is understood here.
    """
    reader = open_gguf(source)
    config = model_config(reader)
    _write_json(directory / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", ids)
    write_tokenizer(reader, directory)
    _write_safetensors(reader, config, directory / "model.safetensors", on_bytes)
    for name in MODEL_FILES:
        flush_to_disk(directory / name)


def open_gguf(source: Path) -> gguf.GGUFReader:
    """Map the file `source`. Raises: InvalidGguf where it is damaged or of another architecture."""
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, OverflowError) as error:
        raise InvalidGguf(f"{source} is no readable GGUF file: {error}") from error
    architecture = metadata(reader, "general.architecture")
    if architecture != "llama":
        raise InvalidGguf(f"{source} holds a model of architecture {architecture!r}; only 'llama' is converted")
    return reader


def weight_bytes(source: Path) -> int:
    """How many bytes of bf16 weights `convert` writes."""
    return sum(2 * int(tensor.n_elements) for tensor in open_gguf(source).tensors)


def model_config(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The content of config.json."""
    num_heads = metadata(reader, "llama.attention.head_count")
    hidden_size = metadata(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": metadata(reader, "llama.feed_forward_length"),
        "max_position_embeddings": metadata(reader, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": metadata(reader, "llama.block_count"),
        "num_key_value_heads": metadata(reader, "llama.attention.head_count_kv"),
        "pad_token_id": metadata(reader, "tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": _shortest(metadata(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_scaling": None,
        "rope_theta": _shortest(metadata(reader, "llama.rope.freq_base")),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "torch_dtype": "bfloat16",
        "vocab_size": len(metadata(reader, "tokenizer.ggml.tokens")),
    }


def hugging_face_name(name: str) -> str:
    """What Hugging Face's Llama calls the GGUF tensor `name`. Raises: InvalidGguf for a name that no Llama has."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise InvalidGguf(f"tensor {name!r} has no place in a Llama model")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def rotary_row_order(num_rows: int, num_heads: int) -> NDArray[np.intp]:
    """The rows of a GGUF Q or K projection in Hugging Face's order: [num_rows].

    llama.cpp rotates neighbouring rows of a head, (0, 1), (2, 3)…; Hugging Face rotates row i with row i + head_dim/2.
    """
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).ravel()


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of `values` (finite) in bf16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype("<u2")


def flush_to_disk(path: Path) -> None:
    """Return once what was written to the file or directory `path` would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_safetensors(
    reader: gguf.GGUFReader, config: dict[str, Any], path: Path, on_bytes: Callable[[int], object]
) -> None:
    # Written piece by piece: the safetensors package wants every tensor in memory at once.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        end = offset + 2 * int(tensor.n_elements)
        header[hugging_face_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in reader.tensors:
            _write_tensor(tensor, config, file, on_bytes)


def _write_tensor(
    tensor: gguf.ReaderTensor, config: dict[str, Any], file: BinaryIO, on_bytes: Callable[[int], object]
) -> None:
    for values in _float_rows(tensor, config):
        if not np.isfinite(values).all():
            raise InvalidGguf(f"tensor {tensor.name!r} holds a value that is not finite")
        file.write(to_bfloat16(values).tobytes())
        on_bytes(2 * values.size)


def _float_rows(tensor: gguf.ReaderTensor, config: dict[str, Any]) -> Iterator[NDArray[np.float32]]:
    data = tensor.data  # [rows] or [rows, bytes of a quantized row]: whole rows can be moved without dequantizing
    if tensor.name.endswith("attn_q.weight"):
        data = data[rotary_row_order(len(data), config["num_attention_heads"])]
    elif tensor.name.endswith("attn_k.weight"):
        data = data[rotary_row_order(len(data), config["num_key_value_heads"])]
    for start in range(0, len(data), _ROWS_AT_ONCE):
        yield gguf.dequantize(data[start : start + _ROWS_AT_ONCE], tensor.tensor_type)


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))  # 1e-05, where the fp32 number read as a double is 9.999999747378752e-06


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
