"""A small Llama as a GGUF file, written by the gguf package itself."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 2, 64, 4, 2, 16, 96
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ1", "ab"]
Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0


def write_tiny_gguf(path: Path, **changes: Any) -> dict[str, NDArray[np.float32]]:
    """A Llama of two layers in `path`; returns the tensors' values as gguf itself dequantizes them."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre_tokenizer", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(["Ġ 1", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    values = {}
    for name, (shape, kind) in (tiny_shapes() | changes.get("tensors", {})).items():
        raw = rng.standard_normal(shape, np.float32) * np.float32(changes.get("scale", 1.0))
        data = raw if kind is None else gguf.quantize(raw, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        values[name] = raw if kind is None else gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def tiny_shapes() -> dict[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType | None]]:
    """Shape and quantization (None: fp32) by the tensor's name."""
    shapes: dict[str, tuple[tuple[int, ...], gguf.GGMLQuantizationType | None]] = {
        "token_embd.weight": ((len(TOKENS), HIDDEN), Q8_0),
        "output_norm.weight": ((HIDDEN,), None),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": ((HIDDEN,), None),
            f"blk.{layer}.attn_q.weight": ((HEADS * HEAD_DIM, HIDDEN), Q4_1),
            f"blk.{layer}.attn_k.weight": ((KV_HEADS * HEAD_DIM, HIDDEN), Q4_1),
            f"blk.{layer}.attn_v.weight": ((KV_HEADS * HEAD_DIM, HIDDEN), Q8_0),
            f"blk.{layer}.attn_output.weight": ((HIDDEN, HEADS * HEAD_DIM), Q4_1),
            f"blk.{layer}.ffn_norm.weight": ((HIDDEN,), None),
            f"blk.{layer}.ffn_gate.weight": ((INNER, HIDDEN), Q4_1),
            f"blk.{layer}.ffn_up.weight": ((INNER, HIDDEN), Q4_1),
            f"blk.{layer}.ffn_down.weight": ((HIDDEN, INNER), Q4_1),
        }
    return shapes
