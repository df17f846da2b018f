"""The gateway's servicer on the front end's own port, over a core that the test plays at its socket."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.gateway.service import SERVICE_NAME
from scheduler_service.kv_messages import KvCleared, KvEvents, KvRemoved, KvStored, KvSubscribe, KvUnsubscribe
from tests.contract.frontend_harness import WORDS, World, failure, rest

SUBSCRIBE = common.SubscribeKvEventsRequest()
KV_EVENTS = [KvCleared(), KvStored([11], None, np.arange(4, dtype="<i4").tobytes(), 4)]


def engine(world: World) -> Any:
    return vllm_engine_pb2_grpc.VllmEngineStub(world.channel)


def request(*, stream: bool, **params: Any) -> vllm.GenerateRequest:
    tokenized = vllm.TokenizedInput(input_ids=[7, 8, 9])
    sampling = vllm.SamplingParams(skip_special_tokens=True, **params)
    return vllm.GenerateRequest(request_id="r-1", tokenized=tokenized, stream=stream, sampling_params=sampling)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_goes_to_the_core_and_its_tokens_come_back(world: World, stream: bool) -> None:
    call = engine(world).Generate(request(stream=stream, seed=3, max_tokens=20, n=2))
    submit = await world.core.hear(ipc.Submit)
    assert (submit.request_id, submit.max_tokens, submit.sampling.seed, len(submit.streams)) == ("r-1", 20, 3, 2)
    assert np.frombuffer(submit.token_ids, "<i4").tolist() == [7, 8, 9]
    world.core.admit(submit)
    for index in (1, 0):
        world.core.finish(submit, pb.FINISH_REASON_LENGTH, WORDS[index : index + 3], choice=index)
    messages = await rest(call)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    for message in messages:
        tokens[message.chunk.index] += message.chunk.token_ids
        tokens[message.complete.index] += message.complete.output_ids
    assert tokens == {0: WORDS[:3], 1: WORDS[1:4]}
    assert sorted(message.complete.index for message in messages if message.HasField("complete")) == [0, 1]


async def test_a_stop_string_ends_the_request_in_the_core_and_is_told(world: World) -> None:
    call = engine(world).Generate(request(stream=True, stop=["fox"]))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    world.core.outputs(submit.streams[0], WORDS)
    stopped = await world.core.hear(ipc.Stop)
    assert stopped.stream == submit.streams[0]
    world.core.finish(submit, pb.FINISH_REASON_STOP)
    *chunks, end = await rest(call)
    assert (end.complete.finish_reason, end.complete.matched_stop_str) == ("stop", "fox")
    assert end.complete.completion_tokens == sum(len(message.chunk.token_ids) for message in chunks) < len(WORDS)


async def test_a_call_that_is_cancelled_is_abandoned_in_the_core(world: World) -> None:
    call = engine(world).Generate(request(stream=False))
    submit = await world.core.hear(ipc.Submit)
    call.cancel()
    abandoned = await world.core.hear(ipc.Abandon)
    assert abandoned.stream == submit.streams[0]


async def test_a_request_whose_core_dies_is_unavailable_and_so_tried_elsewhere(world: World) -> None:
    call = engine(world).Generate(request(stream=False))
    await world.core.hear(ipc.Submit)
    await world.core.stop()
    assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE
    assert (await failure(engine(world).Generate(request(stream=False)))).code() is grpc.StatusCode.UNAVAILABLE
    await world.core.start()


async def test_the_cores_cache_events_are_streamed_until_the_subscriber_leaves(world: World) -> None:
    calls = [engine(world).SubscribeKvEvents(SUBSCRIBE) for _ in range(2)]
    numbers = [(await world.core.hear(KvSubscribe)).subscription for _ in calls]
    assert numbers[0] != numbers[1]
    for number in numbers:
        world.core.say(KvEvents(number, KV_EVENTS, snapshot_parts=1))
    for call in calls:
        batch = await asyncio.wait_for(call.read(), 10)
        assert batch.events[1].stored.blocks[0].block_hash == 11
    calls[0].cancel()
    left = await world.core.hear(KvUnsubscribe)
    assert left.subscription in numbers
    (stays,) = set(numbers) - {left.subscription}
    world.core.say(KvEvents(stays, [KvRemoved([11])]))
    batch = await asyncio.wait_for(calls[1].read(), 10)
    assert list(batch.events[0].removed.block_hashes) == [11]


async def test_a_subscription_ends_with_data_loss_when_the_core_dies(world: World) -> None:
    call = engine(world).SubscribeKvEvents(SUBSCRIBE)
    await world.core.hear(KvSubscribe)
    await world.core.stop()
    assert (await failure(call)).code() is grpc.StatusCode.DATA_LOSS
    assert (await failure(engine(world).SubscribeKvEvents(SUBSCRIBE))).code() is grpc.StatusCode.UNAVAILABLE
    await world.core.start()


async def test_the_servicer_is_known_to_the_health_service(world: World) -> None:
    stub: Any = health_pb2_grpc.HealthStub(world.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
