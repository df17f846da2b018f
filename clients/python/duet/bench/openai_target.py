"""Any server with OpenAI's /v1/completions as the target of a load: HTTP/1.1 and server-sent events.

A connection for each request, made shortly before it is due; what is read from it is noted with its time and decoded
after the stream's end. Tokens are counted by the usage that the server reports: of each message where it does so in
each, else of the whole spread evenly over the messages, and where it reports none every message counts as one.
"""

import asyncio
import dataclasses
import functools
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from duet.bench.load import LEAD_S, sleep_until
from duet.bench.metrics import Arrivals
from duet.bench.scenarios import Request
from duet.errors import DuetError, InternalError, InvalidRequest, StreamCut, Unavailable

Piece = tuple[float, bytes]  # when it came, and what


@dataclasses.dataclass(frozen=True)
class OpenAITarget:
    """The server at `url`, http://host:port."""

    url: str
    model: str

    @classmethod
    def at(cls, url: str, model: str | None = None) -> "OpenAITarget":
        """The target at an address; the model is the first that the server lists where none is named."""
        url = url.rstrip("/").removesuffix("/v1")
        if urlsplit(url).scheme != "http" or not urlsplit(url).hostname:
            raise InvalidRequest(f"{url} is not of the form http://host:port")
        return cls(url, model or _get(f"{url}/v1/models")["data"][0]["id"])

    async def connect(self) -> "OpenAISession":
        """A session."""
        return OpenAISession(self.url, self.model)

    def describe(self) -> dict[str, Any]:
        """Where it is and what it serves."""
        return {"model": {"name": self.model}, "server": {"url": self.url}}


class OpenAISession:
    """Requests for the completions of one model."""

    def __init__(self, url: str, model: str) -> None:
        self._url = urlsplit(url)
        self._model = model

    async def stream(self, request: Request, begin: "asyncio.Future[float]") -> Callable[[], Arrivals]:
        """As load.Session says."""
        message = self._message(request)
        pieces: list[Piece] = []
        due = await begin + request.start_s
        await sleep_until(due - LEAD_S / 2)
        reader, writer = await asyncio.open_connection(self._url.hostname, self._url.port or 80)
        try:
            await sleep_until(due)
            sent = time.perf_counter()
            writer.write(message)
            while data := await reader.read(65536):
                pieces.append((time.perf_counter(), data))
        finally:
            writer.close()
        return functools.partial(_read, sent, sent - due, len(request.prompt), pieces)

    def _message(self, request: Request) -> bytes:
        order = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.output_len,
            "temperature": request.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps(order).encode()
        lines = (
            f"POST {self._url.path}/v1/completions HTTP/1.1",
            f"Host: {self._url.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",  # so that the end of the stream is the end of the response
        )
        return "\r\n".join((*lines, "", "")).encode() + body


def _get(url: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise InternalError(f"{url}: {error}") from None
    except urllib.error.URLError as error:
        raise Unavailable(f"no connection to {url}: {error.reason}") from None


def _read(sent: float, lag_s: float, prompt_tokens: int, pieces: list[Piece]) -> Arrivals:
    messages: list[tuple[float, int | None]] = []  # when, and tokens so far where it is told
    closing: list[tuple[float, int | None]] = []  # messages without text that only tell the reason of the end
    usage: dict[str, Any] = {}
    for when, line in _lines(_body(pieces)):
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        chunk = json.loads(line[5:])
        if "error" in chunk:
            raise InternalError(f"the server sent {chunk['error']}")
        usage = chunk.get("usage") or usage
        told = (chunk.get("usage") or {}).get("completion_tokens")
        for choice in chunk["choices"]:
            ends = choice.get("finish_reason") and not choice.get("text")
            (closing if ends else messages).append((when, told))
    total = usage.get("completion_tokens")
    if total is not None and len(messages) < total:  # the last token's text may be empty
        messages += closing
    if not messages:
        raise StreamCut("a stream ended before its first token")
    counts, counted_by = _count([told for _, told in messages], total)
    return Arrivals(
        sent=sent,
        times=[when for when, _ in messages],
        num_tokens=counts,
        prompt_tokens=prompt_tokens,
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        lag_s=lag_s,
        counted_by=counted_by,
    )


def _count(told: list[int | None], total: int | None) -> tuple[list[int], str]:
    """Tokens of each message, and what says so."""
    known = [count for count in told if count is not None]
    if len(known) == len(told):
        return [later - sooner for sooner, later in itertools.pairwise([0, *known])], "usage of each message"
    if total is None:
        return [1] * len(told), "messages"
    bounds = [total * index // len(told) for index in range(len(told) + 1)]
    return [later - sooner for sooner, later in itertools.pairwise(bounds)], "usage"


def _lines(body: Iterator[Piece]) -> Iterator[Piece]:
    rest = b""
    for when, data in body:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield when, line


def _body(pieces: list[Piece]) -> Iterator[Piece]:
    """The parts of a response's body, each with the time of its last byte. Raises: DuetError for a failed request."""
    raw = b"".join(data for _, data in pieces)
    head, found, body = raw.partition(b"\r\n\r\n")
    status, *headers = head.decode("latin-1").split("\r\n")
    if not found:
        raise StreamCut("a response ended within its head")
    if status.split()[1] != "200":
        raise _refusal(status, body)
    ends = list(itertools.accumulate(len(data) for _, data in pieces))
    place = len(head) + len(found)
    if not any(line.lower().replace(" ", "") == "transfer-encoding:chunked" for line in headers):
        for (when, _), end in zip(pieces, ends, strict=True):
            yield when, raw[place:end]
            place = max(place, end)
        return
    number = 0
    while True:
        start = raw.find(b"\r\n", place) + 2
        size = int(raw[place : start - 2].split(b";")[0], 16) if start > 1 else -1
        if size < 0 or start + size > len(raw):
            raise StreamCut("a response ended within a chunk")
        if not size:
            return
        while ends[number] < start + size:
            number += 1
        yield pieces[number][0], raw[start : start + size]
        place = start + size + 2


def _refusal(status: str, body: bytes) -> DuetError:
    kind = InvalidRequest if status.split()[1].startswith("4") else InternalError
    return kind(f"{status}: {' '.join(body.decode(errors='replace').split())[:500]}")
