"""How requests begin and end: order of admission, deadlines, Cancel."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from duet import Client, UnknownRequest
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.e2e.system import ENDLESS, ROOT, Refusal, System, generate_request, refusal_of, tokens_of, wait_until


def test_deadline_ends_a_running_request(server: System) -> None:
    call = server.stub.Generate(generate_request([1, 2, 3], max_tokens=ENDLESS), timeout=0.5)
    assert next(call).HasField("started")
    assert next(call).HasField("delta")
    assert refusal_of(call).code is grpc.StatusCode.DEADLINE_EXCEEDED
    server.wait_idle()


def test_deadline_counts_in_the_queue_too(narrow_server: System) -> None:
    with narrow_server.endless() as running:
        call = narrow_server.stub.Generate(generate_request([1, 2, 3], max_tokens=4), timeout=0.5)
        wait_until(lambda: narrow_server.load().waiting_requests == 1)
        assert refusal_of(call).code is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: narrow_server.load().waiting_requests == 0)
        assert next(running).HasField("delta"), "the one that runs goes on"


@contextlib.contextmanager
def client_that_freezes(server: System, *, once: str) -> Iterator[None]:
    """A request with a deadline of 2 s whose client is stopped, `once` the load counts it, before it could give up."""
    params = f"SamplingParams(max_tokens={ENDLESS}, ignore_eos=True)"
    code = f"from duet import *; Client({server.address!r}).generate([5], {params}, timeout_s=2)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as client:
        wait_until(lambda: getattr(server.load(), once) == 1)
        client.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            client.kill()


def test_server_keeps_the_deadline_of_a_running_request_itself(server: System) -> None:
    with client_that_freezes(server, once="running_requests"):
        before = server.load()
        server.wait_idle()
        assert server.load().output_tokens_total - before.output_tokens_total < ENDLESS * 0.9, "it ended by itself"


def test_server_keeps_the_deadline_of_a_waiting_request_itself(narrow_server: System) -> None:
    with narrow_server.endless(), client_that_freezes(narrow_server, once="waiting_requests"):
        before = narrow_server.load()
        wait_until(lambda: narrow_server.load().waiting_requests == 0)
        assert narrow_server.load().prompt_tokens_total == before.prompt_tokens_total, "it was admitted"


def test_request_is_cancelled_by_its_id_from_another_connection(server: System) -> None:
    with server.endless(request_id="mine") as call, Client(server.address) as other:
        assert next(call).HasField("delta")
        other.cancel("mine")
        *_, last = call
        with pytest.raises(UnknownRequest, match="mine"):
            other.cancel("mine")
    assert last.finished.reason == pb.FINISH_REASON_CANCELLED
    assert last.finished.usage.output_tokens < ENDLESS
    assert not last.finished.HasField("stop_token_id")


def test_waiting_request_is_cancelled_by_its_id(narrow_server: System) -> None:
    with narrow_server.endless():
        call = narrow_server.stub.Generate(generate_request([1, 2, 3], max_tokens=4, request_id="queued"))
        wait_until(lambda: narrow_server.load().waiting_requests == 1)
        narrow_server.client.cancel("queued")
        *_, last = call
        assert last.finished.reason == pb.FINISH_REASON_CANCELLED
        assert last.finished.usage.output_tokens == 0


def test_cancel_of_an_unknown_request_is_not_found(server: System) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.stub.Cancel(pb.CancelRequest(request_id="nobody"))
    refusal = Refusal.of(caught.value)
    assert (refusal.code, refusal.field) == (grpc.StatusCode.NOT_FOUND, "request_id")
    assert "nobody" in refusal.message


def test_waiting_requests_are_admitted_by_priority_and_then_by_arrival(narrow_server: System) -> None:
    order: list[str] = []
    lock = threading.Lock()

    def follow(name: str, priority: int | None) -> None:
        request = generate_request([1, 2, 3], max_tokens=2, request_id=name)
        if priority is not None:
            request.priority = priority
        for response in narrow_server.stub.Generate(request):
            if response.HasField("started"):
                with lock:
                    order.append(response.started.request_id)

    arrivals = [("late", 7), ("unset", None), ("zero", 0), ("first", -3), ("later", 7), ("second", -2)]
    with ThreadPoolExecutor(len(arrivals)) as threads:
        with narrow_server.endless():
            waiting = []
            for name, priority in arrivals:
                waiting.append(threads.submit(follow, name, priority))
                wait_until(lambda: narrow_server.load().waiting_requests == len(waiting))
        for future in waiting:
            future.result()
    assert order == ["first", "second", "unset", "zero", "late", "later"]


def test_queue_time_is_told(narrow_server: System) -> None:
    with narrow_server.endless():
        sent = time.monotonic_ns()
        call = narrow_server.stub.Generate(generate_request([1, 2, 3], max_tokens=1))
        wait_until(lambda: narrow_server.load().waiting_requests == 1)
        time.sleep(0.3)
    started, *_ = list(call)
    assert 300_000_000 <= started.started.queue_time_ns <= time.monotonic_ns() - sent


def test_requests_beyond_the_slots_wait_and_are_all_served(server: System) -> None:
    prompts = [[number, 8, 9] for number in range(40)]
    alone = [tokens_of(server.stub.Generate(generate_request(prompt, max_tokens=6))) for prompt in prompts]
    calls = [server.stub.Generate(generate_request(prompt, max_tokens=6)) for prompt in prompts]
    assert [tokens_of(call) for call in calls] == alone
