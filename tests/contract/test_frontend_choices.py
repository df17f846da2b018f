"""Several continuations of one prompt in one stream."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from tests.contract.frontend_harness import WORDS, World, details, events_of, failure, joined, rest
from tests.small_model import byte_level_bpe


def request(n: int, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="the fox", sampling=pb.SamplingParams(n=n), **fields)


def by_choice(responses: Sequence[pb.GenerateResponse]) -> dict[int, list[pb.GenerateResponse]]:
    found = defaultdict(list)
    for response in responses:
        if response.HasField("delta"):
            found[response.delta.index].append(response)
    return found


async def test_choices_share_a_stream_that_starts_once_and_ends_with_the_last_of_them(world: World) -> None:
    call = world.stub.Generate(request(3))
    submit = await world.core.hear(ipc.Submit)
    assert len(set(submit.streams)) == 3
    world.core.admit(submit)
    continuations = [[*WORDS], [*WORDS[::-1]], [*WORDS[3:]]]
    for position in range(len(WORDS)):
        there = [choice for choice in range(3) if position < len(continuations[choice])]
        streams = np.array([submit.streams[choice] for choice in there], "<i4").tobytes()
        tokens = np.array([continuations[choice][position] for choice in there], "<i4").tobytes()
        world.core.say(ipc.Outputs(streams, tokens))
    world.core.finish(submit, pb.FINISH_REASON_STOP, choice=2, stop=9)
    world.core.finish(submit, pb.FINISH_REASON_LENGTH, choice=0)
    first_two = []
    while len(first_two) < 2:
        response = await call.read()
        if response.HasField("finished"):
            first_two.append((response.finished.index, response.finished.reason))
    assert sorted(first_two) == [(0, pb.FINISH_REASON_LENGTH), (2, pb.FINISH_REASON_STOP)]
    world.core.finish(submit, pb.FINISH_REASON_CANCELLED, choice=1)
    assert events_of(await rest(call)) == ["finished"]


async def test_each_choice_has_its_own_tokens_offsets_and_text(world: World) -> None:
    call = world.stub.Generate(request(2))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    responses = [await call.read()]
    backwards = WORDS[::-1]
    for position in range(len(WORDS)):
        world.core.outputs(submit.streams[0], [WORDS[position]])
        world.core.outputs(submit.streams[1], [backwards[position]])
        responses += [await call.read(), await call.read()]
    for choice in range(2):
        world.core.finish(submit, pb.FINISH_REASON_LENGTH, choice=choice)
    responses += await rest(call)
    assert events_of(responses) == ["started", *["delta"] * 2 * len(WORDS), "finished", "finished"]
    for index, token_ids in enumerate([WORDS, backwards]):
        deltas = by_choice(responses)[index]
        assert joined(deltas) == (token_ids, byte_level_bpe().decode(token_ids))
        assert [delta.delta.offset for delta in deltas] == list(range(len(WORDS)))


async def test_a_slow_clients_tokens_are_coalesced_for_each_choice(world: World) -> None:
    num_tokens = 10_000
    token_ids = (WORDS * num_tokens)[:num_tokens]
    call = world.stub.Generate(request(2))
    submit = await world.core.hear(ipc.Submit)
    columns = np.array(submit.streams, "<i4").tobytes()
    for token_id in token_ids:
        world.core.say(ipc.Outputs(columns, np.full(2, token_id, "<i4").tobytes()))
        await asyncio.sleep(0)
    for choice in range(2):
        world.core.finish(submit, pb.FINISH_REASON_LENGTH, choice=choice)
    responses = await rest(call)
    assert [joined(deltas)[0] for deltas in by_choice(responses).values()] == [token_ids] * 2
    assert len(responses) < num_tokens
    assert max(len(response.delta.token_ids) for response in responses) > num_tokens / 10


async def test_a_client_that_leaves_abandons_every_choice_that_has_not_ended(world: World) -> None:
    call = world.stub.Generate(request(3))
    submit = await world.core.hear(ipc.Submit)
    world.core.finish(submit, pb.FINISH_REASON_LENGTH, choice=1)
    await call.read()
    call.cancel()
    heard = [await world.core.hear(ipc.Abandon) for _ in range(2)]
    assert [message.stream for message in heard] == [submit.streams[0], submit.streams[2]]
    await world.stub.GetServer(pb.GetServerRequest())  # goes after an Abandon on the same socket
    assert world.core.heard.empty()


async def test_a_choice_that_fails_ends_the_call_and_abandons_the_others(world: World) -> None:
    call = world.stub.Generate(request(2))
    submit = await world.core.hear(ipc.Submit)
    failed = ipc.Failed(submit.streams[1], "INTERNAL", "InternalError", "as it is")
    world.core.outputs(submit.streams[0], WORDS, failed=[failed])
    assert joined([await call.read()])[0] == WORDS
    error = await failure(call)
    assert (error.code(), details(error)["ErrorInfo"].reason) == (grpc.StatusCode.INTERNAL, "InternalError")
    assert await world.core.hear(ipc.Abandon) == ipc.Abandon(submit.streams[0])


async def test_a_stop_string_ends_its_own_choice_alone(world: World) -> None:
    call = world.stub.Generate(request(2, stop=pb.StopConditions(stop_strings=["fox"])))
    submit = await world.core.hear(ipc.Submit)
    for stream in submit.streams:
        world.core.outputs(stream, WORDS if stream == submit.streams[1] else WORDS[-4:])
    assert await world.core.hear(ipc.Stop) == ipc.Stop(submit.streams[1])
    for choice in range(2):
        world.core.finish(submit, pb.FINISH_REASON_LENGTH, choice=choice)
    responses = await rest(call)
    ends = {one.finished.index: one.finished for one in responses if one.HasField("finished")}
    assert (ends[0].reason, ends[0].HasField("stop_string")) == (pb.FINISH_REASON_LENGTH, False)
    assert (ends[1].reason, ends[1].stop_string) == (pb.FINISH_REASON_STOP, "fox")
    assert joined(by_choice(responses)[1])[1] == "The quick brown "
