"""`duet bench --openai` against a small HTTP server."""

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet.bench.metrics import Arrivals
from duet.bench.openai_target import OpenAITarget, _read
from duet.cli.main import main
from duet.errors import DuetError, InternalError, InvalidRequest, StreamCut

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


class CompletionServer:
    """OpenAI's API for one connection a request, in a thread of its own: two tokens a message, usage at the end."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.refusal: bytes | None = None
        self._port: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._port.result()}"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self._port.set_result(server.sockets[0].getsockname()[1])
        await self._stop.wait()
        server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET /v1/models "):
            body = json.dumps({"data": [{"id": "some-model"}]}).encode()
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        else:
            assert head.startswith("POST /v1/completions HTTP/1.1\r\n")
            assert "Connection: close\r\n" in head
            size = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
            order = json.loads(await reader.readexactly(size))
            self.requests.append(order)
            for part in [self.refusal] if self.refusal else response(order["max_tokens"] // 2, order["max_tokens"]):
                writer.write(part)
                await asyncio.sleep(0.002)
        await writer.drain()
        writer.close()
        await writer.wait_closed()


def event(text: str, finish_reason: str | None = None, usage: dict[str, Any] | None = None) -> bytes:
    choices = [{"index": 0, "text": text, "finish_reason": finish_reason}]
    return b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n"


def usage_event(tokens: int) -> bytes:
    usage = {"completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 3}}
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


def chunked(*parts: bytes) -> list[bytes]:
    chunks = [f"{len(part):x};ext=1\r\n".encode() + part + b"\r\n" for part in parts]
    return [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"]


def response(messages: int, tokens: int) -> list[bytes]:
    texts = [event(f"text {index}") for index in range(messages - 1)]
    return chunked(*texts, event("last", "length"), usage_event(tokens), b"data: [DONE]\n\n")


def read(parts: list[bytes]) -> Arrivals:
    """What is made of parts that come at second 0, 1, ..."""
    return _read(0.0, 0.0, 5, [(float(index), part) for index, part in enumerate(parts)])


@pytest.fixture
def server() -> Iterator[CompletionServer]:
    with CompletionServer() as running:
        yield running


def test_bench_measures_an_openai_server(server: CompletionServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    load = ["--streams", "6", "--input-len", "9", "--output-len", "8", "--repeats", "2", "--processes", "2"]
    assert main(["bench", *load, "--openai", server.url, "--temperature", "0.6", "--json", str(out)]) == 0
    assert len(server.requests) == 3 * 6
    assert len({tuple(order.pop("prompt")) for order in server.requests}) == 3 * 6
    for order in server.requests:
        assert order == {
            "model": "some-model",
            "max_tokens": 8,
            "temperature": 0.6,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    report = json.loads(out.read_text())
    assert (report["median"]["output_tokens"], report["median"]["prompt_tokens"]) == (48, 54)
    assert (report["median"]["cached_tokens"], report["tokens_counted_by"]) == (18, ["usage"])
    assert (report["model"]["name"], report["server"]["url"]) == ("some-model", server.url)
    assert report["median"]["gap_p50_s"] >= 0.001


def test_a_server_that_refuses_or_is_not_there_is_one_line(
    server: CompletionServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusal = b'HTTP/1.1 400 Bad Request\r\n\r\n{"message": "too long"}'
    assert main(["bench", "--openai", server.url, "--model", "m"]) == 1
    assert capsys.readouterr().err == 'duet: HTTP/1.1 400 Bad Request: {"message": "too long"}\n'
    for url, status in (("http://127.0.0.1:1", 3), ("https://127.0.0.1:1", 1), ("127.0.0.1:1", 1)):
        assert main(["bench", "--openai", url]) == status
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["bench", "--openai", "http://127.0.0.1:1", "--model", "m"]) == 3
    assert "Connect call failed" in capsys.readouterr().err


def test_an_address_may_end_as_other_clients_want_it() -> None:
    assert OpenAITarget.at("http://h:1/v1/", "m").url == OpenAITarget.at("http://h:1", "m").url == "http://h:1"


def test_messages_have_the_time_of_their_last_byte() -> None:
    stream = read([*response(3, 3)[:2], *(bytes([byte]) for byte in response(3, 3)[2]), *response(3, 3)[3:]])
    first, second, third = stream.times
    assert (first, third) == (1.0, second + 3)  # its text ends two bytes before its chunk and its event's empty line
    assert stream.num_tokens == [1, 1, 1]


@given(data=st.data(), is_chunked=st.booleans(), newline=st.sampled_from([b"\n", b"\r\n"]))
def test_a_response_is_read_however_it_is_cut(data: st.DataObject, is_chunked: bool, newline: bytes) -> None:
    events = [event("a"), event("b\u2028 \n\n data:"), event("c", "length"), usage_event(7), b"data: [DONE]\n\n"]
    body = b": comment\n\n" + b"".join(events)
    body = body.replace(b"\n", newline)
    cuts = sorted(data.draw(st.lists(st.integers(1, len(body) - 1), max_size=6, unique=True)))
    parts = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    raw = b"".join(chunked(*parts) if is_chunked else [HEAD, b"\r\n", *parts])
    cuts = sorted(data.draw(st.lists(st.integers(1, len(raw) - 1), max_size=6, unique=True)))
    stream = read([raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)])
    assert sum(stream.num_tokens) == 7
    assert len(stream.times) == 3
    assert stream.times == sorted(stream.times)
    assert stream.cached_tokens == 3


def test_tokens_are_counted_by_the_best_that_the_server_tells() -> None:
    told = [event("a", usage={"completion_tokens": 1}), event("b", "length", {"completion_tokens": 5})]
    stream = read(chunked(*told, b"data: [DONE]\n\n"))
    assert (stream.num_tokens, stream.counted_by) == ([1, 4], "usage of each message")
    stream = read(chunked(event("a"), event("b"), event("c", "length"), usage_event(8)))
    assert (stream.num_tokens, stream.counted_by) == ([2, 3, 3], "usage")
    stream = read(chunked(event("a"), event("", "length")))
    assert (stream.num_tokens, stream.counted_by, stream.cached_tokens) == ([1], "messages", None)
    stream = read(chunked(event("a"), event("", "length"), usage_event(2)))  # the last token's text is empty
    assert (stream.num_tokens, stream.times) == ([1, 1], [1.0, 2.0])


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ([], StreamCut, "within its head"),
        ([b"HTTP/1.1 200"], StreamCut, "within its head"),
        (response(3, 3)[:3], StreamCut, "within a chunk"),
        ([*response(3, 3)[:3], response(3, 3)[3][:9]], StreamCut, "within a chunk"),
        ([*response(3, 3)[:3], response(3, 3)[3][:40]], StreamCut, "within a chunk"),
        (chunked(usage_event(0)), StreamCut, "before its first token"),
        (chunked(event("a"), b'data: {"error": {"message": "broke"}}\n\n'), InternalError, "broke"),
        ([b"HTTP/1.1 503 Busy\r\n\r\nlater"], InternalError, "503 Busy: later"),
        ([b"HTTP/1.1 404 Not Found\r\n\r\n"], InvalidRequest, "404"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error(parts: list[bytes], kind: type[DuetError], message: str) -> None:
    with pytest.raises(kind, match=message):
        read(parts)
