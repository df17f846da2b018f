"""What goes to the server and what comes back: prompts, sampling parameters, events and outputs."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

from duet.errors import InvalidRequest, StreamCut
from protos.duet.inference.v1 import inference_pb2 as pb

# Text as it is, token ids, or a conversation of {"role": ..., "content": ...}, oldest first.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
# One event of a stream: first Started, then TokenDelta, last Finished.
Event = pb.Started | pb.TokenDelta | pb.Finished

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
}


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. The server checks the ranges."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # 0, or vLLM's -1, keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: drawn by the server
    max_tokens: int | None = 64  # nano-vLLM's default; None: as many as fit
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()


class Options(TypedDict, total=False):
    """Further arguments of a request; what they mean, left out too, is said in inference.proto."""

    request_id: str
    model: str
    priority: int
    cache_salt: str
    skip_special_tokens: bool


@dataclasses.dataclass(frozen=True)
class Output:
    """A finished continuation."""

    text: str
    token_ids: list[int]
    finish_reason: str  # stop, length or cancelled
    stop_token_id: int | None
    request_id: str
    seed: int
    prompt_tokens: int
    cached_tokens: int  # tokens of the prompt found in the prefix cache
    preemptions: int
    recoveries: int  # executors lost and outlived

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Output":
        """Put the events of one whole stream together."""
        started, *deltas, finished = events
        assert isinstance(started, pb.Started)
        assert isinstance(finished, pb.Finished)
        tokens = [delta for delta in deltas if isinstance(delta, pb.TokenDelta)]
        return cls(
            text="".join(delta.text for delta in tokens),
            token_ids=[token for delta in tokens for token in delta.token_ids],
            finish_reason=_FINISH_REASONS[finished.reason],
            stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
            request_id=started.request_id,
            seed=started.seed,
            prompt_tokens=finished.usage.prompt_tokens,
            cached_tokens=finished.usage.cached_tokens,
            preemptions=finished.usage.preemptions,
            recoveries=finished.usage.recoveries,
        )


class StreamOrder:
    """Watches one stream: `started` is first, offsets follow on, `finished` is last."""

    def __init__(self) -> None:
        self._started = False
        self._finished = False
        self._next_offset = 0

    def take(self, response: pb.GenerateResponse) -> Event:
        """The event of the next message. Raises: StreamCut where it does not follow the one before."""
        name = response.WhichOneof("event")
        if self._finished or (name == "started") == self._started:
            raise StreamCut(f"the server sent {name or 'an empty message'} out of order")
        if name == "started":
            self._started = True
            return response.started
        if name == "finished":
            self._finished = True
            return response.finished
        if response.delta.offset != self._next_offset:
            raise StreamCut(f"tokens from {self._next_offset} were due, those from {response.delta.offset} came")
        self._next_offset += len(response.delta.token_ids)
        return response.delta

    def end(self) -> None:
        """The server closed the stream. Raises: StreamCut before `finished`."""
        if not self._finished:
            raise StreamCut(f"the stream ended after {self._next_offset} tokens without saying why")


def build_request(prompt: Prompt, params: SamplingParams | None, options: Options) -> pb.GenerateRequest:
    """The message for one prompt.

    Raises: InvalidRequest for a value that the field's type cannot hold; all else is left to the server.
    """
    params = params or SamplingParams()
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    for name in ("temperature", "top_p", "min_p", "seed"):
        _set(request.sampling, name, getattr(params, name), "sampling.")
    _set(request.sampling, "top_k", 0 if params.top_k == -1 else params.top_k, "sampling.")
    for name in ("max_tokens", "ignore_eos"):
        _set(request.stop, name, getattr(params, name), "stop.")
    _extend(request.stop.stop_token_ids, params.stop_token_ids, "stop.stop_token_ids")
    for name, value in options.items():
        if name == "skip_special_tokens":
            _set(request.output, name, value, "output.")
        else:
            _set(request, name, value)
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
        _extend(request.token_ids.ids, cast(Sequence[int], prompt), "token_ids.ids")


def _add_message(chat: pb.Chat, message: Mapping[str, Any], path: str) -> None:
    added = chat.messages.add()
    _set(added, "role", message.get("role"), path)
    content = message.get("content")
    if content is None or isinstance(content, str):
        _set(added, "content", content, path)
        return
    for index, part in enumerate(content):
        _set(added.parts.add(), "text", part.get("text"), f"{path}parts[{index}].")


def _set(message: Any, name: str, value: Any, path: str = "") -> None:
    if value is None:
        return
    try:
        setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{path}{name}: {error}", field=path + name) from None


def _extend(repeated: Any, values: Iterable[int], path: str) -> None:
    try:
        repeated.extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{path}: {error}", field=path) from None
