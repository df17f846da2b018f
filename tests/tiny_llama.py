"""A tiny model with random weights."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.small_model import EOS, byte_level_bpe, write_model

MAX_MODEL_LEN = 8_192  # tokens


def write_tiny_llama(directory: Path) -> Path:
    """A Llama that computes a step in a millisecond and continues any prompt differently; returns its directory."""
    write_model(directory)
    config = LlamaConfig(
        vocab_size=byte_level_bpe().get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.3,  # far enough from zero that two best logits are rarely close
        bos_token_id=1,
        eos_token_id=[EOS, 0],
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
