"""What the front end tells of the model, of itself and of its services."""

from pathlib import Path
from typing import Any

import msgspec
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.frontend.service import SERVICE_NAME
from tests.contract.frontend_harness import LOAD, MODEL, READY, World, failure, fields_at_fault, make_world
from tests.small_model import EOS


async def test_the_model_is_described(world: World) -> None:
    assert await world.stub.GetModel(pb.GetModelRequest()) == pb.GetModelResponse(
        name="tiny",
        architecture="LlamaForCausalLM",
        max_model_len=30_000,
        vocab_size=400,
        eos_token_ids=[EOS, 0],
        dtype="float32",
        weights_digest="c0ffee",
        has_chat_template=True,
    )


async def test_the_server_and_its_load_are_described(world: World) -> None:
    server = await world.stub.GetServer(pb.GetServerRequest())
    assert (server.version, server.ready, server.epoch, server.device) == ("0.1.0", True, 3, "cpu")
    expected = {name: getattr(LOAD, name) for name in LOAD.__struct_fields__}
    assert {field.name: value for field, value in server.load.ListFields()} == expected
    assert {field.name for field in pb.Load.DESCRIPTOR.fields} == set(expected)


async def test_load_is_watched_at_the_interval_asked_for(world: World) -> None:
    call = world.stub.WatchLoad(pb.WatchLoadRequest(interval_seconds=0.05))
    assert [(await call.read()).load.waiting_requests for _ in range(3)] == [1, 1, 1]
    call.cancel()
    for interval_s in (0.0, 61.0, float("nan")):
        error = await failure(world.stub.WatchLoad(pb.WatchLoadRequest(interval_seconds=interval_s)))
        assert fields_at_fault(error) == ["interval_seconds"]


async def test_reflection_lists_the_services(world: World) -> None:
    channel: Any = world.channel  # the generated stub is typed for the synchronous one
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    names.discard("vllm.grpc.engine.VllmEngine")  # served where the extra `gateway` is installed
    ours = {SERVICE_NAME, "duet.admin.v1.AdminService"}
    assert names == {*ours, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    for name in ours:
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
    await call.done_writing()


async def test_an_end_of_sequence_outside_the_vocabulary_reaches_neither_core_nor_client(tmp_path: Path) -> None:
    narrow = msgspec.structs.replace(READY, model=msgspec.structs.replace(MODEL, vocab_size=EOS))
    async with make_world(tmp_path, narrow) as world:
        assert (await world.stub.GetModel(pb.GetModelRequest())).eos_token_ids == [0]
        call = world.stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])))
        assert (await world.core.hear(ipc.Submit)).stop_token_ids == [0]
        call.cancel()
