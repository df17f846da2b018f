import asyncio
import contextlib
import re

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details

import duet
import duet.errors
from duet import AsyncClient, Client, SamplingParams
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit import fake_inference as fake
from tests.unit.fake_inference import FakeInference, ServerThread, expected_tokens


def test_stream_yields_started_then_deltas_then_finished(client: Client) -> None:
    events = list(client.stream([5, 6], SamplingParams(max_tokens=5)))
    assert [type(event) for event in events] == [pb.Started, *[pb.TokenDelta] * 3, pb.Finished]
    assert [event.offset for event in events if isinstance(event, pb.TokenDelta)] == [0, 2, 4]


def test_generate_joins_the_deltas_of_a_stream(client: Client) -> None:
    output = client.generate([5, 6], SamplingParams(max_tokens=5, seed=9), request_id="mine")
    assert output.token_ids == expected_tokens([5, 6], 5)
    assert output.text == "<11><12><13><14><15>"
    assert (output.finish_reason, output.stop_token_id) == ("length", None)
    assert (output.request_id, output.seed, output.prompt_tokens, output.cached_tokens) == ("mine", 9, 2, 1)


async def test_async_client_says_the_same_as_the_blocking_one(server: ServerThread) -> None:
    async with AsyncClient(server.address) as client:
        output = await client.generate("ab", SamplingParams(max_tokens=3))
        assert output.token_ids == expected_tokens(list(b"ab"), 3)
        assert (await client.model()).name == "fake"
        assert (await client.server()).ready
        assert [load.uptime_seconds async for load in client.watch_load()] == [1, 2]
        await client.cancel("some")
        with pytest.raises(duet.UnknownRequest):
            await client.cancel("unknown")
    assert server.service.cancel_calls == ["some", "unknown"]


def test_blocking_client_asks_for_model_server_load_and_cancel(client: Client, service: FakeInference) -> None:
    assert client.model().vocab_size == 1000
    assert client.server().load.total_blocks == 100
    assert [load.output_tokens_total for load in client.watch_load(0.5)] == [10, 40]
    client.cancel("some")
    assert service.cancel_calls == ["some"]
    with pytest.raises(duet.UnknownRequest, match="alive"):
        client.cancel("unknown")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, duet.InvalidRequest),
        (grpc.StatusCode.ALREADY_EXISTS, duet.DuplicateRequest),
        (grpc.StatusCode.NOT_FOUND, duet.UnknownRequest),
        (grpc.StatusCode.PERMISSION_DENIED, duet.NotAdmitted),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, duet.QueueFull),
        (grpc.StatusCode.UNAVAILABLE, duet.Unavailable),
        (grpc.StatusCode.ABORTED, duet.Superseded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, duet.DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, duet.InternalError),
        (grpc.StatusCode.DATA_LOSS, duet.InternalError),
    ],
)
async def test_each_status_is_one_error_with_the_servers_details(
    server: ServerThread, code: grpc.StatusCode, kind: type[duet.DuetError]
) -> None:
    violation = details.BadRequest.FieldViolation(field="stop.max_tokens", description="too many")
    server.service.script = fake.fail(
        code,
        "the server's words",
        details.ErrorInfo(reason="Why", domain="duet"),
        details.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
        details.BadRequest(field_violations=[violation]),
    )

    def check(error: duet.DuetError) -> None:
        assert type(error) is kind
        assert "the server's words" in str(error)
        found = (error.code, error.field, error.reason, error.retry_after_s)
        assert found == (code, "stop.max_tokens", "Why", 1.5)

    with pytest.raises(duet.DuetError) as caught:
        await asyncio.to_thread(lambda: Client(server.address, retry=None).generate("x"))
    check(caught.value)
    async with AsyncClient(server.address, retry=None) as client:
        with pytest.raises(duet.DuetError) as caught:
            await client.generate("x")
    check(caught.value)


def test_an_error_without_details_has_none(client: Client, service: FakeInference) -> None:
    service.script = fake.fail(grpc.StatusCode.ALREADY_EXISTS, "in use")
    with pytest.raises(duet.DuplicateRequest) as caught:
        client.generate("x")
    assert (caught.value.field, caught.value.reason, caught.value.retry_after_s) == (None, None, None)


def test_grpcs_own_refusal_of_a_large_message_is_no_full_queue(client: Client, service: FakeInference) -> None:
    service.script = fake.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (25 vs. 24)")
    with pytest.raises(duet.InvalidRequest, match="larger than max") as caught:
        client.generate("x")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, None)


def test_every_error_is_documented_and_exported() -> None:
    kinds = set(duet.DuetError.__subclasses__())
    assert set(re.findall(r"── (\w+)", duet.errors.__doc__ or "")) == {kind.__name__ for kind in kinds}
    assert all(getattr(duet, kind.__name__) is kind and kind.__name__ in duet.__all__ for kind in kinds)


def test_closing_the_iterator_cancels_the_request(client: Client, service: FakeInference) -> None:
    service.script = fake.never_end
    stream = client.stream("x")
    for event in stream:
        if isinstance(event, pb.TokenDelta):
            break
    assert not service.cut_calls.acquire(blocking=False)
    stream.close()  # type: ignore[attr-defined]
    assert service.cut_calls.acquire(timeout=30)


async def test_closing_the_async_iterator_cancels_the_request(server: ServerThread) -> None:
    server.service.script = fake.never_end
    async with AsyncClient(server.address) as client:
        async with contextlib.aclosing(client.stream("x")) as stream:
            async for event in stream:
                if isinstance(event, pb.TokenDelta):
                    break
        assert await asyncio.to_thread(server.service.cut_calls.acquire, timeout=30)


def test_timeout_ends_a_stream(client: Client, service: FakeInference) -> None:
    service.script = fake.never_end
    with pytest.raises(duet.DeadlineExceeded):
        client.generate("x", timeout_s=0.2)


def test_error_of_an_address_where_nothing_listens_names_it() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(duet.Unavailable, match=r"no connection to 127\.0\.0\.1:1:"):
        client.server()


def test_a_proxy_in_the_environment_is_not_used(server: ServerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with Client(server.address) as client:
        assert client.server().ready
