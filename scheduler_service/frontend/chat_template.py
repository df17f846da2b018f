"""Conversations to prompts, with the Jinja template that comes with a model.

The environment offers what transformers' `apply_chat_template` offers, since templates are written against that.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protos.duet.inference.v1.inference_pb2 import Chat, ChatMessage
from scheduler_service.errors import InvalidRequest


class ChatTemplate:
    """A compiled template and the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises: jinja2.TemplateSyntaxError."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, chat: Chat) -> str:
        """The prompt for the assistant's next turn.

        Raises: InvalidRequest for a message without role or content, and where the template refuses the messages.
        """
        messages = [_as_dict(message, f"chat.messages[{i}]") for i, message in enumerate(chat.messages)]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # a template is a program; whatever it raises, these messages made it
            raise InvalidRequest(f"the model's chat template refused the messages: {error}", field="chat") from error


def _as_dict(message: ChatMessage, path: str) -> dict[str, str]:
    if not message.role:
        raise InvalidRequest("a message needs a role", field=f"{path}.role")
    if message.HasField("content") == bool(message.parts):
        raise InvalidRequest("a message needs either content or parts", field=f"{path}.content")
    for i, part in enumerate(message.parts):
        if not part.HasField("part"):
            raise InvalidRequest("a part needs a text", field=f"{path}.parts[{i}].text")
    content = message.content if message.HasField("content") else "".join(part.text for part in message.parts)
    return {"role": message.role, "content": content}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models do not read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here they are only written."""

    tags = {"generation"}  # noqa: RUF012 - the type that jinja declares

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
