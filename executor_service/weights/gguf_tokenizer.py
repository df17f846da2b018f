"""The byte-level BPE tokenizer that a GGUF file carries, as tokenizer.json and tokenizer_config.json."""

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_PRE_TOKENIZER = "smollm"


class InvalidGguf(Exception):
    """The GGUF file is damaged, or holds a kind of model that is not converted here."""


def metadata(reader: gguf.GGUFReader, key: str) -> Any:
    """The value of the file's field `key`. Raises: InvalidGguf where it is missing."""
    field = reader.get_field(key)
    if field is None:
        raise InvalidGguf(f"the GGUF file says nothing of {key}")
    return field.contents()


def write_tokenizer(reader: gguf.GGUFReader, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `directory`.

    Raises: InvalidGguf for a tokenizer of another kind than SmolLM's.
    """
    tokens: list[str] = metadata(reader, "tokenizer.ggml.tokens")
    build_tokenizer(reader, tokens).save(str(directory / "tokenizer.json"))
    ids = {name: metadata(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos"]],
        "eos_token": tokens[ids["eos"]],
        "unk_token": tokens[ids["unknown"]],
        "pad_token": tokens[ids["padding"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata(reader, "llama.context_length"),
        "chat_template": metadata(reader, "tokenizer.chat_template"),
    }
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_tokenizer(reader: gguf.GGUFReader, tokens: list[str]) -> Tokenizer:
    """The tokenizer itself; `tokens` are the file's own, in order of their ids.

    Raises: InvalidGguf for a tokenizer of another kind than SmolLM's.
    """
    kind = metadata(reader, "tokenizer.ggml.model"), metadata(reader, "tokenizer.ggml.pre")
    if kind != ("gpt2", _PRE_TOKENIZER):
        raise InvalidGguf(f"a tokenizer of kind {kind} is not converted, only ('gpt2', {_PRE_TOKENIZER!r})")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # Digits must be split off first: ByteLevel's own pattern would join a digit to the space before it.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer
