"""Clients that leave, stall, repeat themselves or come by the thousand."""

import asyncio
import os
import signal
import subprocess
import sys

import grpc

from protos.duet.inference.v1.inference_pb2_grpc import InferenceServiceStub
from tests.e2e.system import ENDLESS, ROOT, Refusal, System, generate_request, is_idle, tokens_of, wait_until


def test_request_id_in_use_is_refused_until_its_request_ended(server: System) -> None:
    request = generate_request([1, 2, 3], max_tokens=4, request_id="twin")
    with server.endless(request_id="twin") as call:
        refusal = server.refusal(request)
        assert (refusal.code, refusal.field) == (grpc.StatusCode.ALREADY_EXISTS, "request_id")
        assert "twin" in refusal.message
        assert next(call).HasField("delta"), "the first one goes on"
    server.wait_idle()
    assert len(tokens_of(server.stub.Generate(request))) == 4
    assert len(tokens_of(server.stub.Generate(request))) == 4


def test_request_of_a_client_that_disconnects_ends_and_its_blocks_come_back(server: System) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = InferenceServiceStub(channel).Generate(generate_request([1, 2, 3], max_tokens=ENDLESS))
        assert next(call).HasField("started")
        assert next(call).HasField("delta")
        load = server.load()
        assert (load.running_requests, load.used_blocks > 0) == (1, True)
    server.wait_idle()
    assert server.load().output_tokens_total - load.output_tokens_total < ENDLESS / 2, "it went on to its end"


def test_request_of_a_client_that_is_killed_ends(server: System) -> None:
    command = [sys.executable, "-m", "duet", "generate", "Hello", "--ignore-eos", "--address", server.address]
    client = subprocess.Popen([*command, "--max-tokens", str(ENDLESS - 100)], cwd=ROOT, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert os.read(client.stdout.fileno(), 1)
    assert server.load().running_requests == 1
    client.send_signal(signal.SIGKILL)
    client.wait()
    client.stdout.close()
    server.wait_idle()


def test_waiting_request_of_a_client_that_disconnects_leaves_the_queue(narrow_server: System) -> None:
    with narrow_server.endless():
        call = narrow_server.stub.Generate(generate_request([1, 2, 3], max_tokens=4))
        wait_until(lambda: narrow_server.load().waiting_requests == 1)
        call.cancel()
        wait_until(lambda: narrow_server.load().waiting_requests == 0)
        assert narrow_server.load().running_requests == 1


def test_client_that_never_reads_disturbs_nobody_and_finds_all_its_tokens_at_last(server: System) -> None:
    request = generate_request([1, 2, 3], max_tokens=1500)
    expected = tokens_of(server.stub.Generate(request))
    small_window = [("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(server.address, options=small_window) as channel:
        finished_before = server.load().finished_requests_total
        call = InferenceServiceStub(channel).Generate(request)
        wait_until(lambda: server.load().running_requests == 1)
        others = [server.probe() for _ in range(5)]
        assert others == [others[0]] * 5
        wait_until(lambda: server.load().finished_requests_total == finished_before + 6)
        assert is_idle(server.load()), "its blocks are free before it has read a single token"
        responses = list(call)
    assert tokens_of(iter(responses)) == expected
    assert len(responses) < len(expected) / 2, "what it had not taken came in few messages"


async def test_thousand_requests_against_a_queue_of_a_hundred_are_served_or_told_when_to_return(
    narrow_server: System,
) -> None:
    refusals: list[Refusal] = []
    outputs: list[list[int]] = []
    all_decided = asyncio.Event()

    async def generate(stub: InferenceServiceStub, number: int) -> None:
        try:
            responses = [one async for one in stub.Generate(generate_request([number % 400, 2, 3], max_tokens=3))]
            outputs.append(tokens_of(iter(responses)))
        except grpc.aio.AioRpcError as error:
            refusals.append(Refusal.of(error))
            if len(refusals) == 900:
                all_decided.set()

    with narrow_server.endless() as running:
        async with grpc.aio.insecure_channel(narrow_server.address) as channel, asyncio.timeout(90):
            stub = InferenceServiceStub(channel)
            async with asyncio.TaskGroup() as group:
                for number in range(1000):
                    group.create_task(generate(stub, number))
                await all_decided.wait()
                assert (await asyncio.to_thread(narrow_server.load)).waiting_requests == 100
                running.cancel()
    assert (len(outputs), len(refusals)) == (100, 900)
    assert {len(tokens) for tokens in outputs} == {3}
    assert {refusal.code for refusal in refusals} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(refusal.retry_after_s and refusal.retry_after_s > 0 for refusal in refusals)
