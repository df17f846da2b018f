"""The recorder between a scheduler and an executor, which here speak bytes that mean nothing."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.status_pb2 import Status

from duet.recorder import RUN_SESSION, ListenError, record
from duet.recording import Kind, RecordingWriter, read_recording
from tests.unit.cli_harness import duet

EOF = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]
Script = Callable[[Any], Awaitable[None]]
GARBAGE = [b"", b"\xff\xff no message", b"\0" * (5 << 20)]  # the last one is more than gRPC takes by default


class Executor(grpc.GenericRpcHandler):
    """Answers calls of every method by the `script` of the test."""

    def __init__(self) -> None:
        self.script: Script = echo
        self.methods: list[str] = []
        self.ended = asyncio.Queue[str]()  # how each call did

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler:
        self.methods.append(handler_call_details.method)
        return grpc.stream_stream_rpc_method_handler(self._serve)  # pyright: ignore[reportArgumentType]

    async def _serve(self, _: object, context: Any) -> None:
        how = "cancelled"
        try:
            await self.script(context)
            how = "returned"
        finally:
            self.ended.put_nowait(how)


async def echo(context: Any) -> None:
    while (message := await context.read()) is not EOF:
        await context.write(message)


async def work_for_ever(context: Any) -> None:
    await context.write(b"result")
    await asyncio.Event().wait()


async def refuse(context: Any) -> None:
    await context.write(b"info")
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not you", (("why", "because"),))


class Between:
    """A running recorder and both who speak through it."""

    def __init__(self, path: Path, executor: Executor, server: Any, channel: Any) -> None:
        self.path, self.executor, self.server, self.channel = path, executor, server, channel
        self.stop = asyncio.Event()
        self.writer = RecordingWriter(path)

    def call(self, method: str = RUN_SESSION) -> Any:
        return self.channel.stream_stream(method)()

    def recorded(self) -> list[tuple[Kind, int, bytes]]:
        return [(one.kind, one.session, one.payload) for one in read_recording(self.path).records]

    async def end(self) -> tuple[int, str]:
        """The status of the first session that has ended, once one has."""
        while True:
            for kind, _, payload in self.recorded():
                if kind is Kind.END:
                    status = Status.FromString(payload)
                    return status.code, status.message
            await asyncio.sleep(0.01)


@pytest.fixture
async def between(tmp_path: Path) -> AsyncIterator[Between]:
    executor, server = Executor(), grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((executor,))
    executor_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    listening = asyncio.get_running_loop().create_future()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, None)
        between = Between(tmp_path / "recording", executor, server, None)
        with between.writer:
            task = asyncio.create_task(
                record(between.writer, "127.0.0.1:0", f"127.0.0.1:{executor_port}", between.stop, listening.set_result)
            )
            options = [("grpc.max_receive_message_length", -1)]
            between.channel = grpc.aio.insecure_channel(f"127.0.0.1:{await listening}", options=options)
            async with between.channel:
                yield between
            between.stop.set()
            await task


async def test_bytes_pass_both_ways_as_they_are_and_are_recorded(between: Between) -> None:
    call = between.call()
    for message in GARBAGE:
        await call.write(message)
        assert await call.read() == message
    await call.done_writing()
    assert await call.read() is EOF
    assert await call.code() is grpc.StatusCode.OK
    assert await between.end() == (0, "")
    passed = [(kind, 1, message) for message in GARBAGE for kind in (Kind.REQUEST, Kind.RESPONSE)]
    assert between.recorded()[:-1] == passed


async def test_nothing_reaches_a_side_before_it_is_recorded(between: Between) -> None:
    seen_by_executor: list[Any] = []

    async def look(context: Any) -> None:
        assert await context.read() == b"plan"
        seen_by_executor.extend(between.recorded())
        await context.write(b"result")

    between.executor.script = look
    call = between.call()
    await call.write(b"plan")
    assert await call.read() == b"result"
    assert seen_by_executor == [(Kind.REQUEST, 1, b"plan")]
    assert between.recorded()[:2] == [(Kind.REQUEST, 1, b"plan"), (Kind.RESPONSE, 1, b"result")]


async def test_a_refusal_passes_with_its_code_message_and_metadata(between: Between) -> None:
    between.executor.script = refuse
    call = between.call()
    assert await call.read() == b"info"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "not you")
    assert ("why", "because") in tuple(caught.value.trailing_metadata())
    assert await between.end() == (grpc.StatusCode.FAILED_PRECONDITION.value[0], "not you")


async def test_an_executor_that_ends_the_session_in_order_does_so_for_the_scheduler(between: Between) -> None:
    async def leave(context: Any) -> None:
        await context.write(b"info")

    between.executor.script = leave
    call = between.call()
    assert [await call.read(), await call.read()] == [b"info", EOF]
    assert await call.code() is grpc.StatusCode.OK


async def test_a_scheduler_that_leaves_is_gone_for_the_executor_too(between: Between) -> None:
    between.executor.script = work_for_ever
    call = between.call()
    assert await call.read() == b"result"
    call.cancel()
    assert await between.executor.ended.get() == "cancelled"
    assert await between.end() == (grpc.StatusCode.CANCELLED.value[0], "the scheduler ended the call")


async def test_an_executor_that_vanishes_is_gone_for_the_scheduler_too(between: Between) -> None:
    call = between.call()
    await call.write(b"plan")
    await call.read()
    await between.server.stop(None)
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()
    code, _ = await between.end()
    assert code == (await call.code()).value[0] != 0


async def test_without_an_executor_a_call_is_unavailable_and_nothing_is_recorded(between: Between) -> None:
    await between.server.stop(None)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await between.call().read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert between.recorded() == []


async def test_a_recorder_that_is_stopped_ends_sessions_as_in_order(between: Between) -> None:
    between.executor.script = work_for_ever
    call = between.call()
    assert await call.read() == b"result"
    between.stop.set()
    assert await call.read() is EOF
    assert await call.code() is grpc.StatusCode.OK
    assert await between.executor.ended.get() == "cancelled"
    assert await between.end() == (0, "the recorder was stopped")


async def test_sessions_at_the_same_time_are_told_apart(between: Between) -> None:
    calls = [between.call() for _ in range(3)]
    for index, call in enumerate(calls):
        await call.write(b"%d" % index)
        await call.read()
    for index, call in enumerate(calls):
        await call.write(b"%d" % index)
        await call.read()
    sessions = {payload: session for _, session, payload in between.recorded()}
    assert sorted(sessions.values()) == [1, 2, 3]
    assert all(sessions[payload] == session for _, session, payload in between.recorded())


async def test_other_methods_pass_and_are_not_recorded(between: Between) -> None:
    answer = await between.channel.unary_unary("/grpc.health.v1.Health/Check")(b"are you well")
    assert answer == b"are you well"
    assert between.executor.methods == ["/grpc.health.v1.Health/Check"]
    assert between.recorded() == []


async def test_a_full_disk_ends_the_recording_and_not_the_session(
    between: Between, caplog: pytest.LogCaptureFixture
) -> None:
    call = between.call()
    await call.write(b"before")
    await call.read()
    before = between.recorded()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, between.writer._file.fileno())
    os.close(full)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            await call.write(b"after")
            assert await call.read() == b"after"
    assert [message for message in caplog.messages if "No space left" in message] == caplog.messages
    assert len(caplog.messages) == 1
    assert between.recorded() == before


def test_duet_record_leaves_a_file_alone_that_is_no_recording(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("to be kept")
    done = duet("record", str(path), "--listen", "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"duet: {path}: it is no recording, or one of another version\n"
    assert path.read_text() == "to be kept"


async def test_an_address_in_use_is_told(between: Between, tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "another") as writer:
        held = grpc.aio.server()  # which would share its port
        port = held.add_insecure_port("127.0.0.1:0")
        with pytest.raises(ListenError, match=f"127.0.0.1:{port}"):
            await record(writer, f"127.0.0.1:{port}", "127.0.0.1:1", between.stop)
        await held.stop(None)
