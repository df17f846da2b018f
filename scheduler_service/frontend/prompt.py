"""A request against the model: its prompt as tokens, and the token ids that it names."""

import dataclasses
from collections.abc import Iterable, Sequence

from protos.duet.inference.v1.inference_pb2 import GenerateRequest
from scheduler_service import ipc
from scheduler_service.errors import ContextLengthExceeded, InvalidRequest
from scheduler_service.frontend.tokenizer import ModelTokenizer
from scheduler_service.frontend.validation import PROMPT_FIELDS


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


def within_vocabulary(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """Those that the model can generate; its files may name others, and their tokenizer may know more than it."""
    return [token_id for token_id in token_ids if token_id < vocab_size]


def encode_prompt(request: GenerateRequest, tokenizer: ModelTokenizer, model: ipc.ModelInfo) -> list[int]:
    """The prompt's tokens, truncated as asked, checked against vocabulary and limits.

    May take seconds for megabytes of text. Raises: InvalidRequest, ContextLengthExceeded.
    """
    limit = context_limit(model)
    kind = request.WhichOneof("prompt") or "text"
    field = PROMPT_FIELDS[kind]
    match kind:
        case "token_ids":
            token_ids = list(request.token_ids.ids)
        case "chat":
            num_messages = len(request.chat.messages)
            if num_messages > limit.num_tokens:  # rendering them would stall other streams
                message = f"{num_messages} messages cannot fit the {limit.num_tokens} tokens of {limit.holder}"
                raise ContextLengthExceeded(message, field=field)
            token_ids = _encode(request, tokenizer.render(request.chat), tokenizer, limit, field)
        case _:
            token_ids = _encode(request, request.text, tokenizer, limit, field)
    _check_vocabulary(token_ids, model.vocab_size, field, is_list=kind == "token_ids")
    if request.HasField("truncate_prompt_tokens"):
        token_ids = token_ids[-request.truncate_prompt_tokens :]
    _check_length(request, len(token_ids), limit)
    return token_ids


def check_token_ids(request: GenerateRequest, eos_token_ids: Sequence[int], vocab_size: int) -> None:
    """The tokens that the request allows, bans, favours and stops at. Raises: InvalidRequest."""
    sampling, stop = request.sampling, request.stop
    _check_vocabulary(stop.stop_token_ids, vocab_size, "stop.stop_token_ids")
    _check_vocabulary(sampling.allowed_token_ids, vocab_size, "sampling.allowed_token_ids")
    _check_vocabulary(sampling.banned_token_ids, vocab_size, "sampling.banned_token_ids")
    for token_id in sampling.logit_bias:
        _check_vocabulary((token_id,), vocab_size, f"sampling.logit_bias[{token_id}]", is_list=False)
    banned = set(sampling.banned_token_ids)
    if not _leaves_any(sampling.allowed_token_ids, banned, vocab_size):
        name = "allowed_token_ids" if sampling.allowed_token_ids else "banned_token_ids"
        raise InvalidRequest("every token that is allowed is banned", field=f"sampling.{name}")
    if stop.min_tokens:
        banned.update(stop.stop_token_ids, within_vocabulary(eos_token_ids, vocab_size))
        if not _leaves_any(sampling.allowed_token_ids, banned, vocab_size):
            message = "every token that is allowed ends generation, which min_tokens forbids"
            raise InvalidRequest(message, field="stop.min_tokens")


def _leaves_any(allowed: Iterable[int], banned: set[int], vocab_size: int) -> bool:
    allowed = set(allowed)
    return not allowed <= banned if allowed else len(banned) < vocab_size


def _encode(
    request: GenerateRequest, text: str, tokenizer: ModelTokenizer, limit: ContextLimit, field: str
) -> list[int]:
    num_bytes = len(text.encode())
    # What is to be cut may be of any length; for the rest the work is spared where it is in vain.
    if num_bytes > tokenizer.most_bytes(limit.num_tokens) and not request.HasField("truncate_prompt_tokens"):
        raise ContextLengthExceeded(
            f"a prompt of {num_bytes} bytes of text cannot fit the {limit.num_tokens} tokens of {limit.holder}",
            field=field,
        )
    token_ids = tokenizer.encode(text, add_special_tokens=not request.HasField("chat"))
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
    name = "max_tokens" if request.stop.HasField("max_tokens") else "min_tokens"
    wanted = getattr(request.stop, name)
    num_tokens = num_prompt_tokens + wanted
    if num_tokens > limit.num_tokens:
        raise ContextLengthExceeded(
            f"{num_prompt_tokens} prompt tokens and {name} {wanted} make {num_tokens}; "
            f"{limit.holder} holds {limit.num_tokens}",
            field=f"stop.{name}",
        )


def _check_vocabulary(token_ids: Sequence[int], vocab_size: int, field: str, *, is_list: bool = True) -> None:
    """`is_list` where the field holds the tokens themselves, so that the one at fault has a place in it."""
    if not token_ids or max(token_ids) < vocab_size:
        return
    i, token_id = next((i, token_id) for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
    raise InvalidRequest(
        f"token id {token_id} is outside the vocabulary of {vocab_size}", field=f"{field}[{i}]" if is_list else field
    )
