"""Requests that are sent again, and those that are not."""

import socket
import threading
import time
import types
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details

import duet
from duet import AsyncClient, Client, Retry, SamplingParams, retry
from duet.errors import DuetError, InvalidRequest, QueueFull, Unavailable
from duet.retry import MAX_BREAKS, Attempts, Resumptions
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit import fake_inference as fake
from tests.unit.fake_inference import FakeInference, ServerThread

QUICK = Retry(max_attempts=3, first_delay_s=0.01, max_delay_s=0.02)
INFO = details.ErrorInfo(reason="Why", domain="duet")
PARAMS = SamplingParams(max_tokens=2)
GONE = Unavailable("gone")


def failing(times: int, code: grpc.StatusCode, *more: Message) -> fake.Script:
    """Fails the first `times` requests, then serves."""
    count = 0

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        nonlocal count
        count += 1
        if count <= times:
            await fake.abort(context, code, "not now", INFO, *more)
        async for response in fake.count_up(request, context):
            yield response

    return script


RETRIED = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED]
OTHERS = [code for code in grpc.StatusCode if code not in (grpc.StatusCode.OK, *RETRIED)]


@pytest.mark.parametrize("code", RETRIED)
async def test_a_request_is_sent_again_until_it_is_served(server: ServerThread, code: grpc.StatusCode) -> None:
    server.service.script = failing(2, code)
    async with AsyncClient(server.address, retry=QUICK) as client:
        assert len((await client.generate("x", PARAMS)).token_ids) == 2
    assert len(server.service.requests) == 3


@pytest.mark.parametrize("code", RETRIED)
def test_the_last_attempts_error_is_raised(server: ServerThread, code: grpc.StatusCode) -> None:
    server.service.script = failing(9, code)
    with Client(server.address, retry=QUICK) as client, pytest.raises(duet.DuetError) as caught:
        client.generate("x", PARAMS)
    assert caught.value.code is code
    assert len(server.service.requests) == 3


@pytest.mark.parametrize("code", OTHERS, ids=lambda code: code.name)
def test_other_failures_are_final(server: ServerThread, code: grpc.StatusCode) -> None:
    server.service.script = failing(1, code)
    with Client(server.address, retry=QUICK) as client, pytest.raises(duet.DuetError):
        client.generate("x", PARAMS)
    assert len(server.service.requests) == 1


def test_grpcs_own_refusal_of_a_large_message_is_final(client: Client, service: FakeInference) -> None:
    service.script = fake.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (25 vs. 24)")
    with pytest.raises(InvalidRequest):
        client.generate("x")
    assert len(service.requests) == 1


def test_without_a_policy_nothing_is_sent_again(server: ServerThread) -> None:
    server.service.script = failing(1, grpc.StatusCode.UNAVAILABLE)
    with Client(server.address, retry=None) as client, pytest.raises(Unavailable):
        client.generate("x", PARAMS)
    assert len(server.service.requests) == 1


async def test_nothing_is_sent_again_once_an_event_has_come(server: ServerThread) -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield fake.started(request)
        await fake.abort(context, grpc.StatusCode.UNAVAILABLE, "gone", INFO)

    server.service.script = script
    with Client(server.address, retry=QUICK) as client, pytest.raises(Unavailable):
        client.generate("x")
    async with AsyncClient(server.address, retry=QUICK) as client:
        with pytest.raises(Unavailable):
            await client.generate("x")
    assert len(server.service.requests) == 2


def test_the_servers_delay_is_waited_for(server: ServerThread) -> None:
    info = details.RetryInfo(retry_delay=Duration(nanos=500_000_000))
    server.service.script = failing(1, grpc.StatusCode.RESOURCE_EXHAUSTED, info)
    began = time.monotonic()
    with Client(server.address, retry=QUICK) as client:
        client.generate("x", PARAMS)
    assert time.monotonic() - began >= 0.5


def test_a_delay_that_goes_beyond_the_timeout_is_not_waited_for(server: ServerThread) -> None:
    info = details.RetryInfo(retry_delay=Duration(seconds=3600))
    server.service.script = failing(1, grpc.StatusCode.RESOURCE_EXHAUSTED, info)
    with Client(server.address, retry=QUICK) as client, pytest.raises(QueueFull):
        client.generate("x", PARAMS, timeout_s=60)
    assert len(server.service.requests) == 1


def test_the_timeout_is_for_all_attempts_together(server: ServerThread) -> None:
    """The second attempt has what the first and the delay left over."""
    remaining = []
    info = details.RetryInfo(retry_delay=Duration(nanos=500_000_000))

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        remaining.append(context.time_remaining())
        if len(remaining) == 1:
            await fake.abort(context, grpc.StatusCode.UNAVAILABLE, "not now", INFO, info)
        async for response in fake.count_up(request, context):
            yield response

    server.service.script = script
    with Client(server.address, retry=QUICK) as client:
        client.generate("x", PARAMS, timeout_s=9)  # gRPC tells longer ones in whole seconds
    assert remaining[1] <= remaining[0] - 0.4


def test_a_server_that_comes_up_meanwhile_is_found() -> None:
    """A channel that failed to connect connects anew for the next attempt."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with Client(f"127.0.0.1:{port}", retry=Retry(max_attempts=20, first_delay_s=0.2, max_delay_s=0.4)) as client:
        results = []
        thread = threading.Thread(target=lambda: results.append(client.generate("x", PARAMS).token_ids))
        thread.start()
        time.sleep(0.5)
        with ServerThread(port):
            thread.join()
    assert len(results[0]) == 2


# --- the policy alone --------------------------------------------------------------------------------------------


def delays(policy: Retry, make: Callable[[], DuetError], count: int) -> list[float | None]:
    attempts = Attempts(policy, None)
    return [attempts.delay_s(make()) for _ in range(count)]


def test_delays_double_up_to_the_most_and_are_shortened_at_random() -> None:
    policy = Retry(max_attempts=100, first_delay_s=1.0, max_delay_s=10.0)
    for _ in range(50):
        found = delays(policy, lambda: Unavailable("gone"), 90)
        for delay, whole in zip(found, [1, 2, 4, 8, *[10] * 86], strict=True):
            assert delay is not None
            assert whole / 2 <= delay <= whole
    assert len({delays(policy, lambda: Unavailable("gone"), 1)[0] for _ in range(20)}) > 10


def test_a_delay_named_by_the_server_is_never_shortened_and_grows_by_no_more_than_a_quarter() -> None:
    policy = Retry(max_attempts=1000, first_delay_s=100.0, max_delay_s=100.0)
    found = delays(policy, lambda: QueueFull("full", retry_after_s=2.0), 500)
    assert all(delay is not None and 2.0 <= delay <= 2.5 for delay in found)
    assert len(set(found)) > 100


def test_a_full_queue_may_be_waited_for_without_end() -> None:
    patient = Retry(max_attempts=2, waits_for_queue=True)
    attempts = Attempts(patient, None)
    assert all(attempts.delay_s(QueueFull("full")) is not None for _ in range(2000))
    assert attempts.delay_s(Unavailable("gone")) is not None
    assert attempts.delay_s(Unavailable("gone")) is None
    assert delays(Retry(max_attempts=2), lambda: QueueFull("full"), 2)[1] is None


def test_one_attempt_is_one_attempt() -> None:
    assert delays(Retry(max_attempts=1), lambda: Unavailable("gone"), 1) == [None]


# --- resuming ----------------------------------------------------------------------------------------------------


class Clock:
    """Stands still but for what a test adds to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(retry, "time", types.SimpleNamespace(monotonic=lambda: self.now_s))

    def fail(self, resumptions: Resumptions, times: int, error: DuetError = GONE) -> list[float | None]:
        """So many attempts that fail at once, each after the delay of the one before."""
        delays: list[float | None] = []
        for _ in range(times):
            delays.append(resumptions.delay_s(error))
            self.now_s += delays[-1] or 0.0
        return delays


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_resuming_begins_soon_and_is_tried_about_every_second(clock: Clock) -> None:
    found = clock.fail(Resumptions(3600, None, None), 50)
    for delay, whole in zip(found, [0.1, 0.2, 0.4, 0.8, *[1.0] * 46], strict=True):
        assert delay is not None
        assert whole / 2 <= delay <= whole
    named = clock.fail(Resumptions(3600, None, None), 1, Unavailable("gone", retry_after_s=3.0))[0]
    assert named is not None
    assert 3.0 <= named <= 3.75


def test_resuming_lasts_as_long_as_the_silence_may_and_anything_that_is_said_ends_that(clock: Clock) -> None:
    resumptions = Resumptions(10, None, None)
    clock.now_s += 1000  # in a queue: the connection was there
    for _ in range(3):
        begin_s = clock.now_s
        while clock.now_s < begin_s + 8:
            assert clock.fail(resumptions, 1) != [None]
        resumptions.hear(is_new=False)
        clock.now_s += 1000
    begin_s = clock.now_s
    while resumptions.delay_s(GONE) is not None:
        clock.now_s += 0.5
    assert 8 <= clock.now_s - begin_s <= 10


def test_news_make_resuming_quick_again_and_repeats_do_not(clock: Clock) -> None:
    resumptions = Resumptions(3600, None, None)
    clock.fail(resumptions, 9)
    resumptions.hear(is_new=False)
    assert (clock.fail(resumptions, 1)[0] or 0.0) >= 0.5
    resumptions.hear(is_new=True)
    assert (clock.fail(resumptions, 1)[0] or 1.0) <= 0.1


def test_resuming_ends_after_some_breaks_without_news_but_not_after_mere_silence(clock: Clock) -> None:
    resumptions = Resumptions(3600, None, None)
    for _ in range(MAX_BREAKS - 1):
        resumptions.hear(is_new=False)
        assert None not in clock.fail(resumptions, 5)
    resumptions.hear(is_new=False)
    assert clock.fail(resumptions, 1) == [None]


def test_resuming_keeps_to_the_timeout(clock: Clock) -> None:
    resumptions = Resumptions(3600, None, 1.0)
    clock.fail(resumptions, 100)
    assert 1000.5 < clock.now_s < 1001
