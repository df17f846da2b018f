"""Write a checkpoint of a published model's shape with random weights, and a tokenizer of as many tokens.

usage: python -m benchmarks.gpu.make_model SHAPE DIRECTORY

Speed does not depend on the values, as long as they are not zeros.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHAPES = {
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    make(SHAPES[args.shape], args.directory)


def make(shape: dict[str, int], directory: Path) -> None:
    """A Qwen3 of this shape in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tensors = {
        name: (torch.ones(size) if name.endswith("norm.weight") else torch.randn(size, device=device) * 0.02)
        .to("cpu", torch.bfloat16)
        .contiguous()
        for name, size in tensor_sizes(shape).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": shape["vocab_size"] - 1,
        "bos_token_id": None,
        **shape,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer_of(shape["vocab_size"]).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')


def tensor_sizes(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint."""
    hidden, head_dim = shape["hidden_size"], shape["head_dim"]
    q_size, kv_size = (shape[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    intermediate, vocab = shape["intermediate_size"], shape["vocab_size"]
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not shape["tie_word_embeddings"]:
        sizes["lm_head.weight"] = (vocab, hidden)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        sizes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (q_size, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_size, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, q_size),
            f"{prefix}.self_attn.q_norm.weight": (head_dim,),
            f"{prefix}.self_attn.k_norm.weight": (head_dim,),
            f"{prefix}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": (intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, intermediate),
        }
    return sizes


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """Byte-level: the 256 bytes, then short words, so that text is about as long as a real model's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ("".join(word) for length in (2, 3, 4) for word in itertools.product(letters, repeat=length))
    tokens = itertools.islice(itertools.chain(alphabet, words), vocab_size - 1)
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])  # the last id, eos_token_id above
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


if __name__ == "__main__":
    main()
