"""From the bytes of a request to fields that are in range, or to InvalidRequest naming the one at fault."""

from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from protos.duet.inference.v1.inference_pb2 import GenerateRequest, OutputOptions, SamplingParams, StopConditions
from scheduler_service.errors import InvalidRequest

MAX_REQUEST_BYTES = 16 << 20
MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_CHARS = 128
MAX_CHOICES = 128
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_STOP_TOKEN_IDS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_LOGPROBS = 20

MAX_DETACH_S = 3600.0
PROMPT_FIELDS = {"text": "text", "token_ids": "token_ids.ids", "chat": "chat.messages"}
_RANGES = {
    "temperature": (0.0, 100.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (float(np.float32(0.01)), 100.0),  # what a client's 0.01 is in a float
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}

M = TypeVar("M", bound=Message)


def parse(kind: type[M], payload: bytes) -> M:
    """The message in `payload`. Raises: InvalidRequest for bytes that are none, and for more than 16 MiB."""
    if len(payload) > MAX_REQUEST_BYTES:
        raise InvalidRequest(f"the message has {len(payload)} bytes; at most {MAX_REQUEST_BYTES} are accepted")
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        name = kind.DESCRIPTOR.full_name
        raise InvalidRequest(f"the bytes are no {name} message (or a string in it is not UTF-8)") from error


def check_fields(request: GenerateRequest, served_model: str) -> None:
    """Everything that can be said without the executor and the tokenizer. Raises: InvalidRequest."""
    if request.HasField("request_id") and not 1 <= len(request.request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(f"request_id must have 1 to {MAX_REQUEST_ID_CHARS} characters", field="request_id")
    if len(request.cache_salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(f"cache_salt has more than {MAX_CACHE_SALT_CHARS} characters", field="cache_salt")
    if request.HasField("model") and request.model != served_model:
        raise InvalidRequest(f"this server serves {served_model!r}, not {request.model!r}", field="model")
    _check_prompt(request)
    _check_sampling(request.sampling)
    _check_stop(request.stop)
    _check_output(request.output)
    _check_resumption(request)
    if request.HasField("constraint") and request.sampling.allowed_token_ids:
        raise InvalidRequest("a constraint does not go together with allowed_token_ids", field="constraint")


def _check_prompt(request: GenerateRequest) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("one of text, token_ids and chat must be set", field="prompt")
    is_empty = {
        "text": not request.text,
        "token_ids": not request.token_ids.ids,
        "chat": not request.chat.messages,
    }[kind]
    if is_empty:
        raise InvalidRequest("the prompt is empty", field=PROMPT_FIELDS[kind])
    if request.HasField("truncate_prompt_tokens") and request.truncate_prompt_tokens < 1:
        raise InvalidRequest("truncate_prompt_tokens must be at least 1", field="truncate_prompt_tokens")


def _check_sampling(sampling: SamplingParams) -> None:
    """The comparisons are written so that NaN fails them."""
    for name, (low, high) in _RANGES.items():
        if sampling.HasField(name) and not low <= getattr(sampling, name) <= high:
            raise InvalidRequest(f"{name} must be {low:.4g} to {high:g}", field=f"sampling.{name}")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise InvalidRequest("top_p must be above 0 and at most 1", field="sampling.top_p")
    if sampling.HasField("n") and not 1 <= sampling.n <= MAX_CHOICES:
        raise InvalidRequest(f"n must be 1 to {MAX_CHOICES}", field="sampling.n")
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        raise InvalidRequest(f"logit_bias has more than {MAX_LOGIT_BIASES} entries", field="sampling.logit_bias")
    for token_id, bias in sampling.logit_bias.items():
        if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
            message = f"a logit_bias must be {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}"
            raise InvalidRequest(message, field=f"sampling.logit_bias[{token_id}]")


def _check_resumption(request: GenerateRequest) -> None:
    if request.HasField("detach_seconds") and not 0 < request.detach_seconds <= MAX_DETACH_S:
        raise InvalidRequest(f"detach_seconds must be above 0 and at most {MAX_DETACH_S:g}", field="detach_seconds")
    num_choices, num_offsets = request.sampling.n or 1, len(request.resume_offsets)
    if request.HasField("resume_offset") and (num_choices > 1 or num_offsets):
        raise InvalidRequest("resume_offsets tells of several continuations", field="resume_offset")
    if num_offsets not in (0, num_choices):
        raise InvalidRequest(f"{num_offsets} resume_offsets for {num_choices} continuations", field="resume_offsets")
    name = "resume_offset" if request.HasField("resume_offset") else "resume_offsets" if num_offsets else None
    if name and not (request.HasField("request_id") and request.HasField("detach_seconds")):
        raise InvalidRequest("only a request with request_id and detach_seconds can be resumed", field=name)


def _check_stop(stop: StopConditions) -> None:
    if stop.HasField("max_tokens") and stop.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", field="stop.max_tokens")
    if stop.HasField("max_tokens") and stop.min_tokens > stop.max_tokens:
        message = f"min_tokens {stop.min_tokens} is more than max_tokens {stop.max_tokens}"
        raise InvalidRequest(message, field="stop.min_tokens")
    if len(stop.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"at most {MAX_STOP_TOKEN_IDS} stop tokens are accepted", field="stop.stop_token_ids")
    if len(stop.stop_strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings are accepted", field="stop.stop_strings")
    for i, stop_string in enumerate(stop.stop_strings):
        if not 1 <= len(stop_string) <= MAX_STOP_STRING_CHARS:
            message = f"a stop string must have 1 to {MAX_STOP_STRING_CHARS} characters"
            raise InvalidRequest(message, field=f"stop.stop_strings[{i}]")


def _check_output(output: OutputOptions) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(output, name) > MAX_LOGPROBS:
            raise InvalidRequest(f"{name} must be 0 to {MAX_LOGPROBS}", field=f"output.{name}")
