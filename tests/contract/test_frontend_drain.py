"""Draining a server: by its AdminService, which is not everybody's, and by SIGTERM, which ends it."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.duet.admin.v1 import admin_pb2 as admin_pb
from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.errors import NotAdmitted
from scheduler_service.frontend.admin import AdminService, UnusableSecret, read_secret
from servicekit.supervisor import EXIT_GAVE_UP
from tests.contract.frontend_harness import details, failure, fields_at_fault, joined, rest
from tests.contract.service_harness import TOKENS, Front, Service, read_until, running_service
from tests.small_model import write_model

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
COUNT = 40


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with running_service(tmp_path) as service:
        yield service


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        **{"text": "the fox", "stop": pb.StopConditions(max_tokens=COUNT, ignore_eos=True), **fields}
    )


def health(front: Front) -> Any:
    return health_pb2_grpc.HealthStub(front.channel)  # pyright: ignore[reportArgumentType]


async def is_draining(front: Front) -> bool:
    return (await front.stub.GetServer(pb.GetServerRequest())).draining


async def refusal(front: Front) -> None:
    error = await failure(front.stub.Generate(request()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details(error)["ErrorInfo"].reason == "ServerDraining"


# --- AdminService ------------------------------------------------------------------------------------------------


async def test_draining_holds_for_every_front_end_until_it_is_cancelled(service: Service) -> None:
    one, other = service.fronts
    service.executor.going.clear()
    call = one.stub.Generate(request())
    await service.until_load(alive=1)
    watches = [health(front).Watch(health_pb2.HealthCheckRequest()) for front in service.fronts]
    for watch in watches:
        assert (await watch.read()).status == SERVING
    assert not await is_draining(one)
    draining = asyncio.ensure_future(other.admin.Drain(admin_pb.DrainRequest()))
    for front, watch in zip(service.fronts, watches, strict=True):
        assert (await watch.read()).status == NOT_SERVING
        assert (await health(front).Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        assert await is_draining(front)
        await refusal(front)
    assert not draining.done()
    service.executor.going.set()
    assert await draining == admin_pb.DrainResponse(finished_requests=1)
    assert joined(await rest(call))[0] == TOKENS[:COUNT], "what was there ended as ever"
    await refusal(one)
    await one.admin.CancelDrain(admin_pb.CancelDrainRequest())
    for front, watch in zip(service.fronts, watches, strict=True):
        assert (await watch.read()).status == SERVING
        assert not await is_draining(front)
        assert joined(await rest(front.stub.Generate(request())))[0] == TOKENS[:COUNT]


async def test_at_the_limit_what_is_left_ends_with_unavailable(service: Service) -> None:
    one, other = service.fronts
    service.executor.going.clear()
    calls = [one.stub.Generate(request()) for _ in range(3)]
    await service.until_load(alive=3)
    response = await other.admin.Drain(admin_pb.DrainRequest(limit_seconds=0.1))
    assert response == admin_pb.DrainResponse(cut_requests=3)
    for call in calls:
        error = await failure(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error)["ErrorInfo"].reason == "ServerDraining"
    service.executor.going.set()


async def test_a_second_call_waits_for_the_same_end(service: Service) -> None:
    service.executor.going.clear()
    call = service.fronts[0].stub.Generate(request())
    await service.until_load(alive=1)
    drains = [asyncio.ensure_future(front.admin.Drain(admin_pb.DrainRequest())) for front in service.fronts]
    async with asyncio.timeout(10):
        while not await is_draining(service.fronts[0]):
            pass
    service.executor.going.set()
    await rest(call)
    assert [response.cut_requests for response in await asyncio.gather(*drains)] == [0, 0]


async def test_a_request_is_resumed_while_the_server_drains(service: Service) -> None:
    one, other = service.fronts
    service.executor.going.clear()
    call = one.stub.Generate(request(request_id="mine", detach_seconds=60))
    await service.until_load(alive=1)
    call.cancel()
    await service.until_load(detached_requests=1)
    draining = asyncio.ensure_future(one.admin.Drain(admin_pb.DrainRequest()))
    async with asyncio.timeout(10):
        while not await is_draining(other):
            pass
    resumed = other.stub.Generate(request(request_id="mine", detach_seconds=60, resume_offset=0))
    service.executor.going.set()
    assert joined(await rest(resumed))[0] == TOKENS[:COUNT]
    assert (await draining).finished_requests == 1


@pytest.mark.parametrize("limit", [-1.0, float("nan")])
async def test_a_limit_is_a_time(service: Service, limit: float) -> None:
    error = await failure(service.fronts[0].admin.Drain(admin_pb.DrainRequest(limit_seconds=limit)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fields_at_fault(error) == ["limit_seconds"]
    assert not await is_draining(service.fronts[0])


# --- who may ------------------------------------------------------------------------------------------------------


class Caller:
    """A call's context, as far as AdminService looks at it."""

    def __init__(self, peer: str, **metadata: str) -> None:
        self._peer, self._metadata = peer, metadata

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self._metadata.items())


class Core:
    """Says that it drained at once."""

    async def cancel_drain(self) -> None:
        return None


async def admitted(secret: str | None, caller: Caller) -> bool:
    admin = AdminService(Core(), secret)  # pyright: ignore[reportArgumentType]
    try:
        await admin.cancel_drain(admin_pb.CancelDrainRequest(), caller)  # pyright: ignore[reportArgumentType]
    except NotAdmitted:
        return False
    return True


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:4711", "ipv4:127.8.9.1:4711", "ipv6:[::1]:4711", "ipv6:%5B::1%5D:1"])
async def test_without_a_secret_the_loopback_is_admitted(peer: str) -> None:
    assert await admitted(None, Caller(peer))


@pytest.mark.parametrize(
    "peer", ["ipv4:10.0.0.1:4711", "ipv4:12.7.0.1:1", "ipv6:[fe80::1]:4711", "ipv6:%5B::12%5D:1", ""]
)
async def test_without_a_secret_nobody_else_is_whatever_he_brings(peer: str) -> None:
    assert not await admitted(None, Caller(peer))
    assert not await admitted(None, Caller(peer, authorization="Bearer "))


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:4711", "ipv4:10.0.0.1:4711"])
async def test_with_a_secret_whoever_has_it_is_admitted_from_everywhere(peer: str) -> None:
    assert await admitted("open sesame", Caller(peer, authorization="Bearer open sesame"))


@pytest.mark.parametrize("given", [None, "", "open sesame", "Bearer", "Bearer ", "Bearer open", "bearer open sesame"])
async def test_with_a_secret_nobody_without_it_is_not_even_from_the_loopback(given: str | None) -> None:
    metadata = {} if given is None else {"authorization": given}
    assert not await admitted("open sesame", Caller("ipv4:127.0.0.1:4711", **metadata))


async def test_the_secret_is_read_from_its_file_and_asked_for(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("open sesame\n")
    async with running_service(tmp_path, 1, admin_secret_file=str(tmp_path / "secret")) as service:
        (front,) = service.fronts
        for call in (
            front.admin.Drain(admin_pb.DrainRequest()),
            front.admin.CancelDrain(admin_pb.CancelDrainRequest()),
        ):
            error = await failure(call)
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert details(error)["ErrorInfo"].reason == "NotAdmitted"
        assert not await is_draining(front)
        await front.admin.Drain(admin_pb.DrainRequest(), metadata=(("authorization", "Bearer open sesame"),))
        assert await is_draining(front)


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_secret_that_is_not_there_or_empty_keeps_the_server_from_starting(
    tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UnusableSecret, match=str(file)):
        read_secret(str(file))


def test_without_its_secret_a_front_end_ends_for_good_and_says_why_in_one_line(tmp_path: Path) -> None:
    """Open to whoever is on the loopback is not what was asked for."""
    command = [sys.executable, "-m", "scheduler_service.frontend", "--model", str(write_model(tmp_path / "tiny"))]
    options = ["--listen", "127.0.0.1:0", "--core-socket", str(tmp_path / "core.sock")]
    secret = ["--admin-secret-file", str(tmp_path / "secret")]
    ended = subprocess.run([*command, *options, *secret], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == EXIT_GAVE_UP
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"the admin secret in {tmp_path / 'secret'} cannot be read")


# --- SIGTERM ------------------------------------------------------------------------------------------------------


async def test_a_front_end_that_is_told_to_stop_lets_its_streams_end_and_takes_no_others(service: Service) -> None:
    one, other = service.fronts
    service.executor.going.clear()
    call = one.stub.Generate(request())
    await service.until_load(alive=1)
    watch = health(one).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    one.stop.drain()
    assert (await asyncio.wait_for(watch.read(), 5)).status == NOT_SERVING
    await refusal(one)
    assert await is_draining(one)
    assert (await health(one).Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
    assert (await health(other).Check(health_pb2.HealthCheckRequest())).status == SERVING
    assert not await is_draining(other)
    assert not one.running.done()
    service.executor.going.set()
    assert joined(await rest(call))[0] == TOKENS[:COUNT]
    watch.cancel()
    await asyncio.wait_for(one.running, 10)
    assert joined(await rest(other.stub.Generate(request())))[0] == TOKENS[:COUNT]


async def test_a_front_end_without_streams_stops_at_once(service: Service) -> None:
    service.fronts[0].stop.drain()
    await asyncio.wait_for(service.fronts[0].running, 10)


@pytest.mark.parametrize("how", ["told a second time", "told to stop at once", "out of time"])
async def test_streams_are_cut_where_it_is_told_so_or_their_time_is_up(tmp_path: Path, how: str) -> None:
    drain_s = 0.2 if how == "out of time" else 1000.0
    async with running_service(tmp_path, 2, drain_s=drain_s) as service:
        one = service.fronts[0]
        service.executor.going.clear()
        call = one.stub.Generate(request())
        await service.until_load(alive=1)
        if how != "told to stop at once":
            one.stop.drain()
        if how == "told a second time":
            await refusal(one)
            one.stop.drain()
        elif how == "told to stop at once":
            one.stop.stop()
        assert (await failure(call)).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        await asyncio.wait_for(one.running, 10)
        await service.until_load(alive=0)
        service.executor.going.set()


async def test_a_detached_request_outlives_the_front_end_that_had_to_stop(tmp_path: Path) -> None:
    async with running_service(tmp_path, 2, drain_s=0.0) as service:
        one, other = service.fronts
        call = one.stub.Generate(request(request_id="mine", detach_seconds=60))
        responses = await read_until(call, 2)
        service.executor.going.clear()
        one.stop.drain()
        await asyncio.wait_for(one.running, 10)
        service.executor.going.set()
        again = await rest(other.stub.Generate(request(request_id="mine", detach_seconds=60, resume_offset=0)))
        assert joined(again)[0] == TOKENS[:COUNT]
        assert joined(again)[1].startswith(joined(responses)[1])
