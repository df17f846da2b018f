"""Prompts and parameters to the message that goes to the server."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from duet.errors import InvalidRequest
from duet.params import Options, SamplingParams, StructuredOutputsParams
from protos.duet.inference.v1 import inference_pb2 as pb

# Text as it is, token ids, or a conversation of {"role": ..., "content": ...}, oldest first.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

# Where each field of SamplingParams goes; those that are missing here have a function of their own below.
_PATHS = {
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "seed": "sampling.seed",
    "n": "sampling.n",
    "repetition_penalty": "sampling.repetition_penalty",
    "frequency_penalty": "sampling.frequency_penalty",
    "presence_penalty": "sampling.presence_penalty",
    "allowed_token_ids": "sampling.allowed_token_ids",
    "banned_token_ids": "sampling.banned_token_ids",
    "max_tokens": "stop.max_tokens",
    "min_tokens": "stop.min_tokens",
    "ignore_eos": "stop.ignore_eos",
    "stop_token_ids": "stop.stop_token_ids",
    "include_stop_str_in_output": "stop.include_stop_string",
    "logprobs": "output.logprobs",
    "prompt_logprobs": "output.prompt_logprobs",
    "skip_special_tokens": "output.skip_special_tokens",
    "truncate_prompt_tokens": "truncate_prompt_tokens",
}
_UNSET = {field.name: field.default for field in dataclasses.fields(SamplingParams)} | {"max_tokens": None}


def build_request(prompt: Prompt, params: SamplingParams | None, options: Options) -> pb.GenerateRequest:
    """The message for one prompt; what is the server's own default stays unset in it.

    Raises: InvalidRequest for a value that the field's type cannot hold; all else is left to the server.
    """
    params = params or SamplingParams()
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    for name, path in _PATHS.items():
        value = getattr(params, name)
        if value != _UNSET[name]:
            _set(request, path, value)
    if params.top_k not in (0, -1):
        _set(request, "sampling.top_k", params.top_k)
    if params.stop:
        _set(request, "stop.stop_strings", [params.stop] if isinstance(params.stop, str) else params.stop)
    if params.logit_bias:
        _set_logit_bias(request, params.logit_bias)
    if params.structured_outputs is not None:
        _set_constraint(request.constraint, params.structured_outputs)
    for name, value in options.items():
        _set(request, "output.echo" if name == "echo" else name, value)
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _set(request, "text", prompt)
    elif isinstance(prompt, Mapping):
        raise InvalidRequest("a prompt is a string, a list of token ids, or a list of messages", field="prompt")
    elif len(prompt) and isinstance(prompt[0], Mapping):
        for index, message in enumerate(cast(Sequence[Mapping[str, Any]], prompt)):
            _add_message(request.chat, message, f"chat.messages[{index}].")
    else:
        request.token_ids.SetInParent()
        _set(request, "token_ids.ids", prompt)


def _add_message(chat: pb.Chat, message: Mapping[str, Any], path: str) -> None:
    added = chat.messages.add()
    _set(added, "role", message.get("role"), path)
    content = message.get("content")
    if content is None or isinstance(content, str):
        _set(added, "content", content, path)
        return
    for index, part in enumerate(content):
        _set(added.parts.add(), "text", part.get("text"), f"{path}parts[{index}].")


def _set_logit_bias(request: pb.GenerateRequest, biases: Mapping[int, float]) -> None:
    for token_id, bias in biases.items():
        try:
            request.sampling.logit_bias[token_id] = bias
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"logit_bias: {error}", field=f"sampling.logit_bias[{token_id}]") from None


def _set_constraint(constraint: pb.Constraint, wanted: StructuredOutputsParams) -> None:
    languages = [name for name, value in dataclasses.asdict(wanted).items() if value is not None]
    if len(languages) != 1 or wanted.json_object is False:
        raise InvalidRequest("structured_outputs names exactly one language", field="constraint")
    if wanted.json is not None:
        schema = wanted.json if isinstance(wanted.json, str) else json.dumps(wanted.json)
        _set(constraint, "json_schema", schema, "constraint.")
    elif wanted.json_object:
        constraint.json_object.SetInParent()
    elif wanted.choice is not None:
        constraint.choice.SetInParent()
        _set(constraint, "choice.texts", wanted.choice, "constraint.")
    else:
        _set(constraint, languages[0], getattr(wanted, languages[0]), "constraint.")


def _set(message: Any, path: str, value: Any, prefix: str = "") -> None:
    """Set the field at `path` below `message`, whose own path is `prefix`; None leaves it unset."""
    if value is None:
        return
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    field = message.DESCRIPTOR.fields_by_name.get(name)
    if field is None:
        raise InvalidRequest(f"there is no option {path!r}", field=prefix + path)
    try:
        if field.is_repeated:
            getattr(message, name).extend(_elements(value))
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{prefix}{path}: {error}", field=prefix + path) from None


def _elements(value: Any) -> Iterable[Any]:
    if isinstance(value, str):  # whose characters nobody means
        raise TypeError(f"{value!r} is no list")
    return value
