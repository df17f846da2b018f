"""From the bytes of a request to what the core is told, or to InvalidRequest naming the field at fault."""

import dataclasses
import random
import time
import uuid
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from protos.duet.inference.v1.inference_pb2 import GenerateRequest, SamplingParams
from scheduler_service import ipc
from scheduler_service.errors import ContextLengthExceeded, InvalidRequest
from scheduler_service.frontend.tokenizer import ModelTokenizer

MAX_REQUEST_BYTES = 16 << 20
MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_CHARS = 128
MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 100.0
_INT32 = 1 << 31

NOT_IMPLEMENTED = (
    "resume_offset",
    "detach_seconds",
    "sampling.repetition_penalty",
    "sampling.frequency_penalty",
    "sampling.presence_penalty",
    "stop.min_tokens",
    "stop.stop_strings",
    "output.logprobs",
    "output.prompt_logprobs",
)
PROMPT_FIELDS = {"text": "text", "token_ids": "token_ids.ids", "chat": "chat.messages"}

M = TypeVar("M", bound=Message)


@dataclasses.dataclass(frozen=True)
class ContextLimit:
    """What prompt and continuation together must fit."""

    num_tokens: int
    holder: str  # the model, or the KV cache where that is smaller


def context_limit(model: ipc.ModelInfo) -> ContextLimit:
    """The narrower of the model's own limit and the KV cache's."""
    if model.max_cache_tokens < model.max_model_len:
        return ContextLimit(model.max_cache_tokens, "the whole KV cache")
    return ContextLimit(model.max_model_len, "the model")


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
    for path in NOT_IMPLEMENTED:
        if _is_set(request, path):
            raise InvalidRequest(f"{path} is not implemented", field=path)
    if request.HasField("request_id") and not 1 <= len(request.request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(f"request_id must have 1 to {MAX_REQUEST_ID_CHARS} characters", field="request_id")
    if len(request.cache_salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(f"cache_salt has more than {MAX_CACHE_SALT_CHARS} characters", field="cache_salt")
    if request.HasField("model") and request.model != served_model:
        raise InvalidRequest(f"this server serves {served_model!r}, not {request.model!r}", field="model")
    _check_prompt(request)
    _check_sampling(request.sampling)
    if request.stop.HasField("max_tokens") and request.stop.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", field="stop.max_tokens")
    if len(request.stop.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"at most {MAX_STOP_TOKEN_IDS} stop tokens are accepted", field="stop.stop_token_ids")


def encode_prompt(request: GenerateRequest, tokenizer: ModelTokenizer, model: ipc.ModelInfo) -> list[int]:
    """The prompt's tokens, checked against vocabulary and limits. May take seconds for megabytes of text.

    Raises: InvalidRequest, ContextLengthExceeded.
    """
    limit = context_limit(model)
    kind = request.WhichOneof("prompt") or "text"
    field = PROMPT_FIELDS[kind]
    match kind:
        case "token_ids":
            token_ids = request.token_ids.ids
        case "chat":
            num_messages = len(request.chat.messages)
            if num_messages > limit.num_tokens:  # rendering them would stall other streams
                message = f"{num_messages} messages cannot fit the {limit.num_tokens} tokens of {limit.holder}"
                raise ContextLengthExceeded(message, field=field)
            token_ids = _encode(tokenizer, tokenizer.render(request.chat), limit, field, is_chat=True)
        case _:
            token_ids = _encode(tokenizer, request.text, limit, field, is_chat=False)
    _check_length(request, len(token_ids), limit)
    _check_vocabulary(token_ids, model.vocab_size, field, is_list=kind == "token_ids")
    _check_vocabulary(request.stop.stop_token_ids, model.vocab_size, "stop.stop_token_ids")
    return list(token_ids)


def build_submit(
    request: GenerateRequest,
    token_ids: Sequence[int],
    *,
    stream: int,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    arrival: float,
    time_remaining_s: float | None,
) -> ipc.Submit:
    """What the core is told of a checked request; missing id and seed are drawn here."""
    sampling, stop = request.sampling, request.stop
    eos = () if stop.ignore_eos else within_vocabulary(eos_token_ids, vocab_size)
    return ipc.Submit(
        stream=stream,
        request_id=request.request_id if request.HasField("request_id") else uuid.uuid4().hex,
        token_ids=np.array(token_ids, dtype="<i4").tobytes(),
        sampling=ipc.Sampling(
            temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
            top_k=min(sampling.top_k, _INT32 - 1),
            top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
            min_p=sampling.min_p,
            seed=sampling.seed if sampling.HasField("seed") else random.getrandbits(64),
        ),
        stop_token_ids=sorted({*stop.stop_token_ids, *eos}),
        max_tokens=stop.max_tokens if stop.HasField("max_tokens") else None,
        priority=request.priority,
        cache_salt=request.cache_salt,
        arrival=arrival,
        deadline=None if time_remaining_s is None else time.monotonic() + time_remaining_s,
    )


def within_vocabulary(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """Those that the model can generate; its files may name others, and their tokenizer may know more than it."""
    return [token_id for token_id in token_ids if token_id < vocab_size]


def _is_set(request: Message, path: str) -> bool:
    *parents, name = path.split(".")
    for parent in parents:
        request = getattr(request, parent)
    field = request.DESCRIPTOR.fields_by_name[name]
    return bool(getattr(request, name)) if not field.has_presence else request.HasField(name)


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


def _check_sampling(sampling: SamplingParams) -> None:
    """The comparisons are written so that NaN fails them."""
    if not 0 <= sampling.temperature <= MAX_TEMPERATURE:
        raise InvalidRequest(f"temperature must be 0 to {MAX_TEMPERATURE:g}", field="sampling.temperature")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise InvalidRequest("top_p must be above 0 and at most 1", field="sampling.top_p")
    if not 0 <= sampling.min_p <= 1:
        raise InvalidRequest("min_p must be 0 to 1", field="sampling.min_p")
    if sampling.HasField("n") and sampling.n != 1:
        raise InvalidRequest("n other than 1 is not implemented", field="sampling.n")


def _encode(tokenizer: ModelTokenizer, text: str, limit: ContextLimit, field: str, *, is_chat: bool) -> list[int]:
    num_bytes = len(text.encode())
    if num_bytes > tokenizer.most_bytes(limit.num_tokens):
        raise ContextLengthExceeded(
            f"a prompt of {num_bytes} bytes of text cannot fit the {limit.num_tokens} tokens of {limit.holder}",
            field=field,
        )
    token_ids = tokenizer.encode(text, add_special_tokens=not is_chat)
    if not token_ids:
        raise InvalidRequest("the prompt is empty after tokenizing", field=field)
    return token_ids


def _check_length(request: GenerateRequest, num_prompt_tokens: int, limit: ContextLimit) -> None:
    if num_prompt_tokens >= limit.num_tokens:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt_tokens} tokens and {limit.holder} holds {limit.num_tokens}, "
            "at least one of them generated",
            field=PROMPT_FIELDS[request.WhichOneof("prompt") or "text"],
        )
    num_tokens = num_prompt_tokens + request.stop.max_tokens
    if num_tokens > limit.num_tokens:
        raise ContextLengthExceeded(
            f"{num_prompt_tokens} prompt tokens and max_tokens {request.stop.max_tokens} make {num_tokens}; "
            f"{limit.holder} holds {limit.num_tokens}",
            field="stop.max_tokens",
        )


def _check_vocabulary(token_ids: Sequence[int], vocab_size: int, field: str, *, is_list: bool = True) -> None:
    """`is_list` where the field holds the tokens themselves, so that the one at fault has a place in it."""
    for i, token_id in enumerate(token_ids):
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"token id {token_id} is outside the vocabulary of {vocab_size}",
                field=f"{field}[{i}]" if is_list else field,
            )
