"""What the front end and the core say to each other over their Unix socket.

A frame is a little-endian uint32 length and a msgspec MessagePack body. End of file is the death of the peer.
The front end numbers its streams itself; a number is unique while its connection lives.
"""

import asyncio
import struct
from typing import TypeVar

import msgspec

_LENGTH = struct.Struct("<I")
T = TypeVar("T")


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen, every default filled in; the ranges are those of inference.proto."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


# --- front end to core -------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A validated request."""

    stream: int
    request_id: str
    token_ids: bytes  # [num_prompt_tokens] little-endian int32
    sampling: Sampling
    stop_token_ids: list[int]  # the model's own end-of-sequence tokens included, unless ignored
    max_tokens: int | None  # None: as many as fit
    priority: int
    cache_salt: str
    arrival: float  # time.monotonic() seconds; one clock for all processes of a host
    deadline: float | None  # time.monotonic() seconds; None: none


class Abandon(msgspec.Struct, frozen=True, tag=True):
    """The stream's client went away: end its request and send nothing more."""

    stream: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a request by its id, whichever front end holds it; answered by CancelReply."""

    call: int
    request_id: str


class LoadQuery(msgspec.Struct, frozen=True, tag=True):
    """Answered by LoadReply."""

    call: int


FrontendMessage = Submit | Abandon | Cancel | LoadQuery

# --- core to front end -------------------------------------------------------------------------------------------


class ModelInfo(msgspec.Struct, frozen=True):
    """What the executor told of its model and its limits."""

    architecture: str
    dtype: str
    device: str
    weights_digest: str
    vocab_size: int
    max_model_len: int  # tokens
    max_cache_tokens: int  # tokens that the whole KV cache holds


class EngineStatus(msgspec.Struct, frozen=True, tag=True):
    """Sent first on every connection and again at each change."""

    ready: bool  # an executor session is open
    epoch: int  # sessions opened with executors so far
    queue_order: str
    model: ModelInfo | None  # None until an executor has connected once


class Started(msgspec.Struct, frozen=True, array_like=True):
    """First admission of a stream's request."""

    stream: int
    prompt_tokens: int
    cached_tokens: int
    queue_time_ns: int


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """End of a stream; `reason` is a FinishReason of inference.proto."""

    stream: int
    reason: int
    stop_token_id: int | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    recoveries: int


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """End of a stream by an error of scheduler_service.errors."""

    stream: int
    code: str  # name of a grpc.StatusCode
    reason: str  # name of the error's class
    message: str
    field: str | None = None
    retry_after_s: float | None = None


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """One step's news for one front end. Within a stream the order is started, tokens, finished or failed."""

    streams: bytes  # [n] little-endian int32, the stream of each token
    token_ids: bytes  # [n] little-endian int32
    started: list[Started] = []
    finished: list[Finished] = []
    failed: list[Failed] = []


class CancelReply(msgspec.Struct, frozen=True, tag=True):
    """Answer to Cancel."""

    call: int
    found: bool


class Load(msgspec.Struct, frozen=True):
    """A snapshot; the fields are those of inference.proto's Load."""

    waiting_requests: int
    running_requests: int
    max_running_requests: int
    used_blocks: int
    cached_blocks: int
    total_blocks: int
    block_size: int
    prompt_tokens_total: int
    cached_tokens_total: int
    prefill_tokens_total: int
    output_tokens_total: int
    finished_requests_total: int
    preemptions_total: int
    steps_total: int
    uptime_seconds: float


class LoadReply(msgspec.Struct, frozen=True, tag=True):
    """Answer to LoadQuery."""

    call: int
    load: Load


CoreMessage = EngineStatus | Outputs | CancelReply | LoadReply


def encode_frame(message: FrontendMessage | CoreMessage) -> bytes:
    """One message as bytes ready to be written."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """The next message, or None at the end of file.

    Raises: msgspec.ValidationError for a body that is no such message.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
