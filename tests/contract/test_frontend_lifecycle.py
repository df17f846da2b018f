"""The front end while the core and the executor come and go, and its health."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import errors, ipc
from scheduler_service.config import SchedulerConfig
from scheduler_service.frontend.address import PortUnavailable
from scheduler_service.frontend.core_client import CoreClient
from scheduler_service.frontend.generation import Generator
from scheduler_service.frontend.server import FrontendServer
from scheduler_service.frontend.service import SERVICE_NAME
from scheduler_service.frontend.tokenizer import load_model_tokenizer
from tests.contract.frontend_harness import MODEL, READY, World, details, events_of, failure, make_world, rest
from tests.small_model import write_model

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def health_stub(world: World) -> Any:
    """The generated stubs are typed for the synchronous channel, or not at all."""
    return health_pb2_grpc.HealthStub(world.channel)


async def test_a_request_waits_for_the_first_executor(tmp_path: Path) -> None:
    async with make_world(tmp_path, ipc.EngineStatus(False, 0, "fcfs", None)) as world:
        call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
        error = await failure(world.stub.GetModel(pb.GetModelRequest()))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        server = await world.stub.GetServer(pb.GetServerRequest())
        assert (server.ready, server.device) == (False, "")
        world.core.set_status(READY)
        world.core.finish(await world.core.hear(ipc.Submit), pb.FINISH_REASON_LENGTH)
        assert events_of(await rest(call)) == ["finished"]


async def test_a_request_does_not_wait_for_ever(tmp_path: Path) -> None:
    async with make_world(tmp_path, ipc.EngineStatus(False, 0, "fcfs", None), max_pause_s=0.05) as world:
        error = await failure(world.stub.Generate(pb.GenerateRequest(text="the fox")))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert details(error)["ErrorInfo"].reason == "ExecutorUnavailable"


@pytest.mark.parametrize(
    ("remaining_s", "max_pause_s", "kind"),
    [
        (0.05, 10.0, errors.DeadlineExceeded),
        (10.0, 0.05, errors.ExecutorUnavailable),
        (None, 0.05, errors.ExecutorUnavailable),
    ],
)
async def test_the_smaller_bound_on_the_wait_for_an_executor_is_the_error(
    tmp_path: Path, remaining_s: float | None, max_pause_s: float, kind: type[errors.DuetError]
) -> None:
    tokenizer = load_model_tokenizer(write_model(tmp_path / "tiny"), None)
    core = CoreClient(str(tmp_path / "nobody.sock"), max_pause_s=10.0)
    generator = Generator(core, tokenizer, max_pause_s=max_pause_s)
    with pytest.raises(errors.DuetError) as caught:
        await anext(generator.events(pb.GenerateRequest(text="the fox"), time_remaining_s=remaining_s))
    assert type(caught.value) is kind


async def test_requests_go_on_while_a_known_executor_is_away(world: World) -> None:
    world.core.set_status(ipc.EngineStatus(False, 3, "fcfs", MODEL))
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    await world.core.hear(ipc.Submit)
    call.cancel()


async def test_health_follows_the_executors_session(world: World) -> None:
    stub = health_stub(world)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICE_NAME, "")]
    for watch in watches:
        assert (await watch.read()).status == SERVING
    watches.pop().cancel()  # one watcher that leaves takes no other with it
    world.core.set_status(ipc.EngineStatus(False, 3, "fcfs", MODEL))
    for watch in watches:
        assert (await watch.read()).status == NOT_SERVING
    for name in ("", SERVICE_NAME):
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == NOT_SERVING
    world.core.set_status(READY)
    for watch in watches:
        assert (await watch.read()).status == SERVING
    await world.core.stop()
    for watch in watches:
        assert (await watch.read()).status == NOT_SERVING
    await world.core.start()


async def test_health_of_an_unknown_service(world: World) -> None:
    stub = health_stub(world)
    error = await failure(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:{port}", "Address already in use"),
        ("203.0.113.1:0", "Cannot assign requested address"),
        ("127.0.0.1:http", "not of the form host:port"),
        ("localhost", "not of the form host:port"),
    ],
)
async def test_an_address_that_cannot_be_had_is_one_clear_sentence(
    world: World, tmp_path: Path, address: str, reason: str
) -> None:
    listen = address.format(port=world.frontend.port)
    config = SchedulerConfig(model=str(tmp_path / "tiny"), listen=listen, core_socket=world.core.path)
    with pytest.raises(PortUnavailable, match=f"cannot listen on {listen}: .*{reason}"):
        FrontendServer(config)
