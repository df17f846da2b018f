"""Streams of the front end: their order, their pace, and how they are left."""

import asyncio
import logging
import threading
import time
from typing import Any

import grpc
import numpy as np
import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.frontend import generation
from tests.contract.frontend_harness import WORDS, World, details, events_of, failure, fields_at_fault, joined, rest
from tests.small_model import EOS, byte_level_bpe


async def test_a_request_streams_started_deltas_and_finished(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox", sampling=pb.SamplingParams(seed=11)))
    submit = await world.core.hear(ipc.Submit)
    assert np.frombuffer(submit.token_ids, "<i4").tolist() == byte_level_bpe().encode("the fox").ids
    world.core.admit(submit)
    responses = [await call.read()]
    for token_id in WORDS:
        world.core.outputs(submit.streams[0], [token_id])
        responses.append(await call.read())
    world.core.finish(submit, pb.FINISH_REASON_LENGTH)
    responses += await rest(call)
    assert events_of(responses) == ["started", *["delta"] * len(WORDS), "finished"]
    started = responses[0].started
    assert (started.request_id, started.seed) == (submit.request_id, 11)
    assert (started.cached_tokens, started.queue_time_ns) == (1, 99)
    assert joined(responses) == (WORDS, "The quick brown fox jumps over the lazy dog.")
    assert [response.delta.offset for response in responses[1:-1]] == list(range(len(WORDS)))
    finished = responses[-1].finished
    assert (finished.reason, finished.HasField("stop_token_id")) == (pb.FINISH_REASON_LENGTH, False)
    assert finished.usage == pb.Usage(
        prompt_tokens=2,
        cached_tokens=1,
        output_tokens=5,
        preemptions=6,
        recoveries=7,
        queue_time_ns=8,
        time_to_first_token_ns=9,
    )


@pytest.mark.parametrize("skip", [True, False])
async def test_a_stop_token_is_counted_and_not_spoken(world: World, skip: bool) -> None:
    output = pb.OutputOptions(skip_special_tokens=skip)
    call = world.stub.Generate(pb.GenerateRequest(text="the fox", output=output))
    submit = await world.core.hear(ipc.Submit)
    assert submit.stop_token_ids == [0, EOS]
    world.core.outputs(submit.streams[0], [*WORDS, 1, EOS])
    await asyncio.sleep(0.05)  # the end may come in a later frame than the token
    world.core.finish(submit, pb.FINISH_REASON_STOP, stop=EOS)
    responses = await rest(call)
    spoken = byte_level_bpe().decode([*WORDS, 1], skip_special_tokens=skip)
    assert joined(responses) == ([*WORDS, 1, EOS], spoken)
    assert responses[-1].finished.stop_token_id == EOS


async def test_half_a_character_is_held_back_with_its_tokens_until_the_end(world: World) -> None:
    fire = byte_level_bpe().encode("🜁").ids
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    world.core.outputs(submit.streams[0], [*WORDS, fire[0]])
    first = await call.read()
    assert list(first.delta.token_ids) == WORDS
    world.core.finish(submit, pb.FINISH_REASON_LENGTH, token_ids=[fire[1]])
    responses = [first] + await rest(call)
    assert events_of(responses) == ["delta", "delta", "finished"]
    assert list(responses[1].delta.token_ids) == fire[:2]
    assert responses[1].delta.offset == len(WORDS)
    assert joined(responses)[1] == byte_level_bpe().decode([*WORDS, *fire[:2]])


async def test_a_client_that_reads_late_gets_its_tokens_coalesced(world: World) -> None:
    num_tokens = 20_000
    token_ids = (WORDS * num_tokens)[:num_tokens]
    slow = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    for token_id in token_ids:
        world.core.outputs(submit.streams[0], [token_id])
        await asyncio.sleep(0)
    other = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    other_submit = await world.core.hear(ipc.Submit)
    world.core.finish(other_submit, pb.FINISH_REASON_LENGTH, WORDS)
    assert joined(await rest(other))[0] == WORDS  # the slow one holds nobody up
    world.core.finish(submit, pb.FINISH_REASON_LENGTH)
    responses = await rest(slow)
    assert joined(responses) == (token_ids, byte_level_bpe().decode(token_ids))
    assert len(responses) < num_tokens / 2
    assert max(len(response.delta.token_ids) for response in responses) > num_tokens / 10


async def test_many_streams_get_their_own_tokens(world: World) -> None:
    calls = [world.stub.Generate(pb.GenerateRequest(request_id=f"r{i}", text="the fox")) for i in range(20)]
    submits = [await world.core.hear(ipc.Submit) for _ in calls]
    streams = {int(submit.request_id[1:]): submit.streams[0] for submit in submits}
    for position in range(10):
        world.core.say(
            ipc.Outputs(
                np.array(list(streams.values()), "<i4").tobytes(),
                np.array([WORDS[(i + position) % len(WORDS)] for i in streams], "<i4").tobytes(),
                finished=[ipc.Finished(s, 2, None, 1, 0, 10, 0, 0) for s in streams.values() if position == 9],
            )
        )
    for i, call in enumerate(calls):
        responses = await rest(call)
        assert joined(responses)[0] == [WORDS[(i + position) % len(WORDS)] for position in range(10)]


async def test_a_client_that_leaves_abandons_its_request(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    world.core.outputs(submit.streams[0], WORDS)
    await call.read()
    call.cancel()
    assert await world.core.hear(ipc.Abandon) == ipc.Abandon(submit.streams[0])
    world.core.outputs(submit.streams[0], WORDS)  # tokens that were under way are nobody's
    world.core.finish(submit, pb.FINISH_REASON_CANCELLED)
    assert (await world.stub.GetServer(pb.GetServerRequest())).ready


async def test_clients_that_leave_in_a_flood_of_tokens_are_no_errors(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
        submit = await world.core.hear(ipc.Submit)
        for _ in range(50):
            world.core.outputs(submit.streams[0], WORDS)
        await call.read()
        call.cancel()
        for _ in range(50):
            world.core.outputs(submit.streams[0], WORDS)
        assert await world.core.hear(ipc.Abandon) == ipc.Abandon(submit.streams[0])
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_a_stream_that_finished_is_not_abandoned(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    world.core.finish(await world.core.hear(ipc.Submit), pb.FINISH_REASON_LENGTH)
    assert await rest(call)
    await world.stub.GetServer(pb.GetServerRequest())  # goes after an Abandon on the same socket
    assert world.core.heard.empty()


async def test_the_calls_deadline_reaches_the_core(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"), timeout=30)
    submit = await world.core.hear(ipc.Submit)
    assert submit.deadline == pytest.approx(time.monotonic() + 30, abs=5)
    assert submit.arrival == pytest.approx(time.monotonic(), abs=5)
    call.cancel()


async def test_a_call_without_a_deadline_has_none(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    assert (await world.core.hear(ipc.Submit)).deadline is None
    call.cancel()


async def test_a_deadline_that_passes_abandons_the_request(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"), timeout=0.3)
    submit = await world.core.hear(ipc.Submit)
    assert (await failure(call)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert await world.core.hear(ipc.Abandon) == ipc.Abandon(submit.streams[0])


async def test_cancel_says_whether_the_request_was_alive(world: World) -> None:
    world.core.alive.add("a")
    assert await world.stub.Cancel(pb.CancelRequest(request_id="a")) == pb.CancelResponse()
    error = await failure(world.stub.Cancel(pb.CancelRequest(request_id="b")))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert details(error)["ErrorInfo"].reason == "UnknownRequest"
    error = await failure(world.stub.Cancel(pb.CancelRequest()))
    assert (error.code(), fields_at_fault(error)) == (grpc.StatusCode.INVALID_ARGUMENT, ["request_id"])


async def test_long_text_is_tokenized_while_other_streams_go_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long prompt's tokenizing is held until the short request has been served."""
    served = threading.Event()
    encode_prompt = generation.encode_prompt

    def held(request: pb.GenerateRequest, *rest: Any) -> list[int]:
        if len(request.text) > 5000:
            assert served.wait(20)
        return encode_prompt(request, *rest)

    monkeypatch.setattr(generation, "encode_prompt", held)
    long = world.stub.Generate(pb.GenerateRequest(text="the fox " * 1000))
    short = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    world.core.finish(await world.core.hear(ipc.Submit), pb.FINISH_REASON_LENGTH)
    assert events_of(await rest(short)) == ["finished"]
    served.set()
    assert len((await world.core.hear(ipc.Submit)).token_ids) > 4000
    long.cancel()


async def test_a_constraint_reaches_the_core_as_a_grammar_made_beside_the_event_loop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    monkeypatch.setattr(
        generation, "to_grammar", lambda one: (threads.append(threading.current_thread()), one.regex)[1]
    )
    call = world.stub.Generate(pb.GenerateRequest(text="the fox", constraint=pb.Constraint(regex="a+")))
    assert (await world.core.hear(ipc.Submit)).constraint == "a+"
    assert threads[0] is not threading.current_thread()
    call.cancel()
