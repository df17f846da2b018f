"""What the front end knows of a model: its tokenizer, chat template and end-of-sequence tokens, out of its files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from protos.duet.inference.v1.inference_pb2 import Chat
from scheduler_service.errors import InvalidRequest
from scheduler_service.frontend.chat_template import ChatTemplate
from scheduler_service.frontend.detokenizer import Detokenizer, Pieces

_NORMALIZER_SHRINK = 4  # composing normalizers (NFC) turn at most this many bytes into one


class UnusableModel(Exception):
    """The model directory lacks something or is damaged; the message is one sentence."""


class ModelTokenizer:
    """Text to tokens and back. Safe to call from several threads."""

    def __init__(
        self, name: str, tokenizer: Tokenizer, chat_template: ChatTemplate | None, eos_token_ids: tuple[int, ...]
    ) -> None:
        """Raises: ValueError for a vocabulary without any single ASCII letter or digit."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.name = name  # what GenerateRequest.model may say
        self.chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._pieces = {skip: Pieces(tokenizer, skip) for skip in (True, False)}
        longest = max(len(token.encode()) for token in tokenizer.get_vocab())
        self._max_bytes_per_token = longest * (_NORMALIZER_SHRINK if tokenizer.normalizer is not None else 1)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of `text`; special tokens written in it are recognised.

        `add_special_tokens` adds what the tokenizer's own post-processor adds, such as a leading BOS.
        """
        # The batch call is the one that does not compute character offsets.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def most_bytes(self, num_tokens: int) -> int:
        """A text of more bytes than this has more tokens than `num_tokens`."""
        return num_tokens * self._max_bytes_per_token

    def render(self, chat: Chat) -> str:
        """A conversation as prompt text, to be encoded without adding special tokens. Raises: InvalidRequest."""
        if self.chat_template is None:
            raise InvalidRequest("the model has no chat template; send text or token_ids", field="chat")
        return self.chat_template.render(chat)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of all of `token_ids`."""
        return self._pieces[skip_special_tokens].decode(token_ids)

    def text_alone(self, token_id: int) -> str:
        """What one token reads in the middle of others, special tokens too; U+FFFD for half a character."""
        return self._pieces[False].text(token_id)

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A fresh one, for one continuation."""
        return Detokenizer(self._pieces[skip_special_tokens])


def load_model_tokenizer(directory: Path, name: str | None) -> ModelTokenizer:
    """Read a Hugging Face model directory; `name` defaults to the directory's.

    Raises: UnusableModel.
    """
    config = _read_json(directory / "config.json")
    tokenizer_config = _read_json(directory / "tokenizer_config.json", required=False)
    generation_config = _read_json(directory / "generation_config.json", required=False)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UnusableModel(f"{directory} has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise UnusableModel(f"{path} is not a tokenizer: {error}") from error
    eos_token_ids = _eos_token_ids(directory, generation_config, config)
    chat_template = _chat_template(directory, tokenizer_config)
    try:
        return ModelTokenizer(name or directory.resolve().name, tokenizer, chat_template, eos_token_ids)
    except ValueError as error:
        raise UnusableModel(f"{path} cannot be served: {error}") from error


def _read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise UnusableModel(f"{path.parent} has no {path.name}")
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnusableModel(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnusableModel(f"{path} does not hold a JSON object")
    return content


def _eos_token_ids(directory: Path, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """From the first of `configs` that has any: one token or a list of them."""
    eos = next((config["eos_token_id"] for config in configs if config.get("eos_token_id") is not None), [])
    token_ids = eos if isinstance(eos, list) else [eos]
    for token_id in token_ids:
        if type(token_id) is not int or token_id < 0:  # JSON's true would pass for an int
            raise UnusableModel(f"an eos_token_id of {directory} is {token_id!r}, which is no token id")
    return tuple(token_ids)


def _chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    source = _template_source(directory, tokenizer_config)
    if source is None:
        return None
    if not isinstance(source, str):
        raise UnusableModel(f"the chat template of {directory} is not a string")
    try:
        return ChatTemplate(source, _special_tokens(directory, tokenizer_config))
    except jinja2.TemplateError as error:
        raise UnusableModel(f"the chat template of {directory} does not compile: {error}") from error


def _template_source(directory: Path, tokenizer_config: Mapping[str, Any]) -> Any:
    """From a file of its own or else the tokenizer's config, where it may be one of several named ones."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UnusableModel(f"{path} is not UTF-8: {error}") from error
    source = tokenizer_config.get("chat_template")
    if not isinstance(source, list):
        return source
    if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in source):
        raise UnusableModel(f"a chat template listed in {directory} lacks its name or template")
    return next((entry["template"] for entry in source if entry["name"] == "default"), None)


def _special_tokens(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like; each is a string or an object with a `content`."""
    tokens = {}
    for key, value in tokenizer_config.items():
        if key.endswith("_token"):
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str):
                tokens[key] = token
            elif isinstance(value, dict):
                raise UnusableModel(f"the {key} of {directory} has no content")
    return tokens
