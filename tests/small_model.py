"""Model directories for tests that need a tokenizer and no weights: trained in a second, chat template included."""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = [
    "The quick brown fox jumps over the lazy dog and runs away from the hunter.",
    "Blocks, tables, queues and slots: a scheduler sends one plan for every step.",
    "你好，世界！今天天气很好。 Καλημέρα κόσμε. Привет, мир. 😀 🎉 👩‍🚀 naïve café",
    "def main(argv):\n    return [int(x) for x in argv[1:]]\n",
] * 4
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EOS = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def byte_level_bpe() -> Tokenizer:
    """Like GPT-2's, Qwen's and SmolLM2's: any bytes, characters split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


@functools.cache
def metaspace_unigram() -> Tokenizer:
    """Like T5's: words begin with a space mark, and the text's first one is dropped."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[*SPECIAL_TOKENS, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


@functools.cache
def byte_fallback_bpe() -> Tokenizer:
    """Like Llama 2's: space marks, bytes as tokens of their own, a leading BOS."""
    letters = sorted({character for line in WORDS[:2] for character in line} - {" "})
    tokens = [*SPECIAL_TOKENS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "▁t", "▁a", "he"]
    merges = [("▁", "t"), ("▁", "a"), ("h", "e")]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(  # pyright: ignore
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return tokenizer


def write_model(directory: Path, tokenizer: Tokenizer | None = None, **tokenizer_config: object) -> Path:
    """A model directory without weights; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level_bpe()).save(str(directory / "tokenizer.json"))
    config = {"architectures": ["LlamaForCausalLM"], "eos_token_id": 0}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 0]}))
    content = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>", "bos_token": None} | tokenizer_config
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory
