"""What the front end and the core say to each other over their Unix socket.

A frame is a little-endian uint32 length and a msgspec MessagePack body. End of file is the death of the peer.
The front end numbers its streams itself; a number is unique while its connection lives.
"""

import asyncio
import struct
from typing import Annotated, TypeVar

import msgspec

from scheduler_service.kv_messages import KvEvents, KvSubscribe, KvUnsubscribe

FRAME_LENGTH = struct.Struct("<I")
T = TypeVar("T")


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are chosen, every default filled in; the ranges are those of inference.proto."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] = []  # empty: all
    banned_token_ids: list[int] = []
    min_tokens: int = 0
    logprobs: int | None = None  # alternatives of each generated token; None: no log-probabilities
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first


# --- front end to core -------------------------------------------------------------------------------------------


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """What a front end holds of one choice of a request whose core has died."""

    choice_index: int
    token_ids: bytes  # generated so far, little-endian int32
    max_total_tokens: int  # prompt included
    was_told_start: bool
    cached_tokens: int
    queue_time_ns: int
    first_token_time: float | None  # time.monotonic() seconds; None: no token yet
    recoveries: int  # this one included
    lacks_prompt_logprobs: bool
    end: "Finished | Failed | None" = None


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A validated request. Each choice has a stream of its own, which starts, and ends or fails, by itself."""

    streams: Annotated[list[int], msgspec.Meta(min_length=1)]  # [n] in the order of the choices' indices
    request_id: str
    token_ids: bytes  # [num_prompt_tokens] little-endian int32
    sampling: Sampling
    stop_token_ids: list[int]  # the model's own end-of-sequence tokens included, unless ignored
    end_token_ids: list[int]  # the model's own end-of-sequence tokens, ignored or not
    max_tokens: int | None  # None: as many as fit
    priority: int
    cache_salt: str
    arrival: float  # time.monotonic() seconds; one clock for all processes of a host
    deadline: float | None  # time.monotonic() seconds; None: none
    constraint: str | None = None  # a grammar that LLMatcher of llguidance accepts; None: none
    tenant: str = ""  # to whom the id belongs
    detach_s: float | None = None  # how long the request outlives its client, and its result its end; None: not at all
    resumes: bool = False  # takes over the request of this id; what it was told so far is told again
    progress: list[Progress] = []  # of each stream, where a core that died had the request; empty: it is new


class Abandon(msgspec.Struct, frozen=True, tag=True):
    """The stream's client went away: end its choice and send nothing more."""

    stream: int


class Detach(msgspec.Struct, frozen=True, tag=True):
    """The stream's client went away: send nothing more, and keep the choice for the request's `detach_s`."""

    stream: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """A stop string was completed: end the stream's choice with FINISH_REASON_STOP, unless it has ended meanwhile."""

    stream: int


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End every choice of a request by its id, whichever front end holds it; answered by CancelReply."""

    call: int
    tenant: str
    request_id: str


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Take no new requests; answered by DrainReply when none is left."""

    call: int
    limit_s: float | None  # then those that are left are ended; None: they take the time they need


class CancelDrain(msgspec.Struct, frozen=True, tag=True):
    """Take new requests again; answered by DrainReply, as every Drain that waits is."""

    call: int


class LoadQuery(msgspec.Struct, frozen=True, tag=True):
    """Answered by LoadReply."""

    call: int


FrontendMessage = (
    Submit | Abandon | Detach | Stop | Cancel | Drain | CancelDrain | LoadQuery | KvSubscribe | KvUnsubscribe
)

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
    draining: bool = False  # new requests are refused


class Started(msgspec.Struct, frozen=True, array_like=True):
    """First admission of a stream's choice."""

    stream: int
    prompt_tokens: int
    cached_tokens: int
    queue_time_ns: int
    seed: int  # the request's own, which one that resumes it need not know


class Finished(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End of a stream; `reason` is a FinishReason of inference.proto."""

    stream: int
    reason: int
    stop_token_id: int | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    recoveries: int
    queue_time_ns: int = 0  # as in Started
    time_to_first_token_ns: int = 0  # from arrival; 0: no token was generated


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End of a stream by an error of scheduler_service.errors."""

    stream: int
    code: str  # name of a grpc.StatusCode
    reason: str  # name of the error's class
    message: str
    field: str | None = None
    retry_after_s: float | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one generated token: its own, then those of the likeliest tokens, most likely first.

    A stream that asked has one for each of its tokens in the same Outputs, in the same order.
    """

    stream: int
    token_ids: bytes  # [1 + Sampling.logprobs] little-endian int32
    logprobs: bytes  # [1 + Sampling.logprobs] little-endian float32
    rank: int  # tokens likelier than the generated one, plus 1


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at every position of a prompt but the first: the token that stands there, then the likeliest.

    Of a request's choices the first alone gets them, once. No choice gets a token before.
    """

    stream: int
    token_ids: bytes  # [num_prompt_tokens - 1, width] little-endian int32
    logprobs: bytes  # [num_prompt_tokens - 1, width] little-endian float32
    ranks: bytes  # [num_prompt_tokens - 1] little-endian int32: tokens likelier than the one that stands there, plus 1
    width: int  # 1 + Sampling.prompt_logprobs


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """One step's news for one front end.

    Within a stream the order is started, prompt_logprobs, tokens, finished or failed.
    """

    streams: bytes  # [n] little-endian int32, the stream of each token
    token_ids: bytes  # [n] little-endian int32
    started: list[Started] = []
    finished: list[Finished] = []
    failed: list[Failed] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[PromptLogprobs] = []


class CancelReply(msgspec.Struct, frozen=True, tag=True):
    """Answer to Cancel."""

    call: int
    found: bool


class DrainReply(msgspec.Struct, frozen=True, tag=True):
    """Answer to Drain and CancelDrain."""

    call: int
    finished: int  # requests that ended by themselves meanwhile
    cut: int  # requests that the limit ended


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
    detached_requests: int
    quarantined_requests: int
    idle_checks_total: int
    idle_check_failures_total: int
    executor_losses_total: int


class LoadReply(msgspec.Struct, frozen=True, tag=True):
    """Answer to LoadQuery."""

    call: int
    load: Load


CoreMessage = EngineStatus | Outputs | CancelReply | DrainReply | LoadReply | KvEvents


def encode_frame(message: msgspec.Struct) -> bytes:
    """One message as bytes ready to be written."""
    body = msgspec.msgpack.encode(message)
    return FRAME_LENGTH.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """The next message, or None at the end of file.

    Raises: msgspec.ValidationError for a body that is no such message.
    """
    try:
        (length,) = FRAME_LENGTH.unpack(await reader.readexactly(FRAME_LENGTH.size))
        return decoder.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
