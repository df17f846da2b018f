"""The core dies: what the front end tells the next one, and what its clients see of that."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest

from protos.duet.admin.v1 import admin_pb2, admin_pb2_grpc
from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from scheduler_service.frontend import core_client
from tests.contract.frontend_harness import READY, WORDS, World, details, events_of, failure, joined, make_world, rest
from tests.small_model import EOS, byte_level_bpe

NO_EXECUTOR_YET = ipc.EngineStatus(False, 0, "fcfs", None)


@pytest.fixture
def bear_quick_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores of a test live for moments, and none of them dies of its requests."""
    monkeypatch.setattr(core_client, "_QUICK_LOSS_S", 0.0)


async def next_core(world: World) -> None:
    await world.core.stop()
    await world.core.start()


def rows(stream: int, token_ids: list[int]) -> list[ipc.TokenLogprobs]:
    """Log-probabilities by which each token is known again."""
    return [
        ipc.TokenLogprobs(stream, np.array([t], "<i4").tobytes(), np.array([-t / 4], "<f4").tobytes(), t)
        for t in token_ids
    ]


def held(progress: ipc.Progress) -> list[int]:
    return np.frombuffer(progress.token_ids, "<i4").tolist()


async def read_tokens(call: Any, count: int) -> list[pb.GenerateResponse]:
    """Responses up to the one that brings the last of `count` tokens."""
    responses = []
    while len(joined(responses)[0]) < count:
        responses.append(await call.read())
    return responses


async def test_the_next_core_is_told_what_there_is_and_the_stream_goes_on_with_none_lost_and_none_twice(
    world: World,
) -> None:
    request = pb.GenerateRequest(
        text="the fox", request_id="mine", stop=pb.StopConditions(max_tokens=40), priority=3, cache_salt="salt"
    )
    call = world.stub.Generate(request, metadata=(("duet-tenant", "red"),))
    first = await world.core.hear(ipc.Submit)
    (stream,) = first.streams
    world.core.admit(first)
    world.core.outputs(stream, WORDS[:4])
    responses = await read_tokens(call, 4)
    await next_core(world)
    again = await world.core.hear(ipc.Submit)
    (progress,) = again.progress
    assert again == msgspec.structs.replace(first, progress=[progress])
    assert held(progress) == WORDS[:4]
    assert (progress.was_told_start, progress.cached_tokens, progress.queue_time_ns) == (True, 1, 99)
    assert progress.max_total_tokens == len(first.token_ids) // 4 + 40
    assert (progress.choice_index, progress.recoveries, progress.end) == (0, 1, None)
    assert progress.first_token_time is not None
    world.core.outputs(stream, WORDS[4:])
    world.core.finish(again, pb.FINISH_REASON_LENGTH)
    responses += await rest(call)
    assert events_of(responses)[0] == "started"
    assert events_of(responses).count("started") == 1
    assert joined(responses) == (WORDS, byte_level_bpe().decode(WORDS))
    assert responses[-1].finished.usage.recoveries == 7, "as the core says"


async def test_a_stream_outlives_any_number_of_cores(world: World, bear_quick_losses: None) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    for count, token_id in enumerate(WORDS[:5]):
        world.core.outputs(submit.streams[0], [token_id])
        await world.stub.GetServer(pb.GetServerRequest())  # its answer comes after the token
        await next_core(world)
        (progress,) = (await world.core.hear(ipc.Submit)).progress
        assert (held(progress), progress.recoveries) == (WORDS[: count + 1], count + 1)
    world.core.finish(submit, pb.FINISH_REASON_LENGTH, WORDS[5:])
    assert joined(await rest(call))[0] == WORDS


async def test_a_request_that_had_not_started_is_submitted_as_such(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    await world.core.hear(ipc.Submit)
    await next_core(world)
    again = await world.core.hear(ipc.Submit)
    (progress,) = again.progress
    assert (held(progress), progress.was_told_start, progress.first_token_time) == ([], False, None)
    assert progress.max_total_tokens == 30_000, "as many as fit the model that was there"
    world.core.admit(again)
    world.core.finish(again, pb.FINISH_REASON_LENGTH, WORDS)
    assert events_of(await rest(call)) == ["started", "delta", "finished"]


async def test_resubmissions_go_out_before_every_new_request(world: World) -> None:
    old = [world.stub.Generate(pb.GenerateRequest(text="the fox")) for _ in range(3)]
    for _ in old:
        await world.core.hear(ipc.Submit)
    await world.core.stop()
    new = [world.stub.Generate(pb.GenerateRequest(text="the fox")) for _ in range(3)]
    await asyncio.sleep(0.1)  # they are under way, or will be later
    await world.core.start()
    heard = [await world.core.hear(ipc.Submit) for _ in range(6)]
    assert [bool(submit.progress) for submit in heard] == [True] * 3 + [False] * 3
    for call in (*old, *new):
        call.cancel()


async def test_a_new_request_waits_for_the_next_core_and_for_its_executor(world: World) -> None:
    await world.core.stop()
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    world.core.status = NO_EXECUTOR_YET
    await world.core.start()
    await wait_connected(world)
    assert world.core.heard.empty()
    world.core.set_status(READY)
    world.core.finish(await world.core.hear(ipc.Submit), pb.FINISH_REASON_LENGTH)
    assert events_of(await rest(call)) == ["finished"]


async def test_a_request_that_was_about_to_be_submitted_waits_for_the_next_cores_executor(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core dies while the prompt is prepared, and the next one refuses what comes before it knows the model."""
    generator = world.frontend._generator
    prepare, preparing, go_on = generator._prepare, asyncio.Event(), asyncio.Event()

    async def prepare_slowly(*args: Any) -> Any:
        preparing.set()
        await go_on.wait()
        return await prepare(*args)

    monkeypatch.setattr(generator, "_prepare", prepare_slowly)
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    await preparing.wait()
    world.core.status = NO_EXECUTOR_YET
    await next_core(world)
    await wait_connected(world)
    go_on.set()
    for _ in range(3):
        await world.stub.GetServer(pb.GetServerRequest())
    assert world.core.heard.empty()
    world.core.set_status(READY)
    world.core.finish(await world.core.hear(ipc.Submit), pb.FINISH_REASON_LENGTH)
    assert events_of(await rest(call)) == ["finished"]


async def wait_connected(world: World) -> None:
    """The front end has heard the next core."""
    async with asyncio.timeout(10):
        while True:
            try:
                await world.stub.GetServer(pb.GetServerRequest())
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)
            else:
                return


async def test_requests_of_which_one_core_after_the_other_seems_to_die_end_and_the_next_ones_are_served(
    world: World,
) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    await world.core.hear(ipc.Submit)
    for _ in range(2):
        await next_core(world)
        await world.core.hear(ipc.Submit)
    await next_core(world)
    assert (await failure(call)).code() is grpc.StatusCode.INTERNAL
    await wait_connected(world)
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    assert not submit.progress
    world.core.finish(submit, pb.FINISH_REASON_LENGTH)
    assert events_of(await rest(call)) == ["finished"]


async def test_without_a_core_for_too_long_streams_and_new_requests_are_unavailable(tmp_path: Path) -> None:
    async with make_world(tmp_path, max_pause_s=0.3) as world:
        call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
        submit = await world.core.hear(ipc.Submit)
        world.core.admit(submit)
        world.core.outputs(submit.streams[0], WORDS[:3])
        responses = await read_tokens(call, 3)
        await world.core.stop()
        error = await failure(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error)["ErrorInfo"].reason == "ExecutorUnavailable"
        assert joined(responses)[0] == WORDS[:3]
        error = await failure(world.stub.Generate(pb.GenerateRequest(text="the fox")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        await world.core.start()
        await wait_connected(world)
        assert world.core.heard.empty(), "who was told of the end is not submitted again"


async def test_what_else_is_asked_of_a_core_that_is_away_fails_at_once_and_may_be_asked_again(world: World) -> None:
    await world.core.stop()
    for call in (
        world.stub.GetServer(pb.GetServerRequest()),
        world.stub.Cancel(pb.CancelRequest(request_id="mine")),
    ):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details(error)["RetryInfo"].retry_delay.ToMilliseconds() > 0
    await world.core.start()


async def test_what_was_asked_of_a_core_that_dies_over_it_fails(world: World) -> None:
    draining = asyncio.ensure_future(admin_pb2_grpc.AdminServiceStub(world.channel).Drain(admin_pb2.DrainRequest()))
    await world.core.hear(ipc.Drain)
    await world.core.stop()
    assert (await failure(draining)).code() is grpc.StatusCode.UNAVAILABLE
    await world.core.start()


async def test_a_request_that_has_ended_is_not_submitted_again_while_its_client_is_slow_to_read(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    call.cancel()
    core = world.frontend.core
    streams = core.new_streams(1, asyncio.Event())
    submit = msgspec.structs.replace(submit, streams=[streams[0].number])
    assert READY.model is not None
    await core.submit(submit, streams, READY.model)  # as a generator does that waits for its client after this
    for _ in range(2):
        await world.core.hear(ipc.Abandon | ipc.Submit)
    world.core.finish(submit, pb.FINISH_REASON_LENGTH, WORDS)
    await world.stub.GetServer(pb.GetServerRequest())
    assert streams[0].end is not None
    await next_core(world)
    await wait_connected(world)
    assert world.core.heard.empty()
    assert streams[0].take() == WORDS


async def test_a_request_that_was_cancelled_while_the_core_was_away_is_not_submitted_again(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    await world.core.hear(ipc.Submit)
    await world.core.stop()
    call.cancel()
    await asyncio.wait_for(world.frontend._generator._is_idle.wait(), 10)
    await world.core.start()
    await wait_connected(world)
    assert world.core.heard.empty()


@pytest.mark.parametrize("detach_seconds", [None, 5.0])
async def test_of_several_continuations_those_that_ended_are_not_generated_again(
    world: World, detach_seconds: float | None
) -> None:
    call = world.stub.Generate(
        pb.GenerateRequest(text="the fox", sampling=pb.SamplingParams(n=3), detach_seconds=detach_seconds)
    )
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    world.core.outputs(submit.streams[0], WORDS[:2])
    world.core.finish(submit, pb.FINISH_REASON_STOP, WORDS[:3], choice=1)
    responses = await read_tokens(call, 5)
    while not responses[-1].HasField("finished"):
        responses.append(await call.read())
    await next_core(world)
    again = await world.core.hear(ipc.Submit)
    by_index = {progress.choice_index: progress for progress in again.progress}
    assert len(again.streams) == len(by_index)
    if detach_seconds is None:
        assert set(by_index) == {0, 2}
    else:  # whoever resumes it is told its end, too
        end = by_index[1].end
        assert isinstance(end, ipc.Finished)
        assert (end.reason, held(by_index[1])) == (pb.FINISH_REASON_STOP, WORDS[:3])
    assert (held(by_index[0]), held(by_index[2])) == (WORDS[:2], [])
    world.core.finish(submit, pb.FINISH_REASON_LENGTH, WORDS[2:], choice=0)
    world.core.finish(submit, pb.FINISH_REASON_LENGTH, WORDS, choice=2)
    responses += await rest(call)
    tokens: dict[int, list[int]] = {index: [] for index in range(3)}
    for response in responses:
        tokens[response.delta.index] += response.delta.token_ids
    assert tokens == {0: WORDS, 1: WORDS[:3], 2: WORDS}
    assert sorted(r.finished.index for r in responses if r.HasField("finished")) == [0, 1, 2]


async def test_text_that_was_held_back_is_told_once_it_is_whole(world: World, bear_quick_losses: None) -> None:
    """The core dies between the tokens of one character, and inside what may become a stop string."""
    text = "né brown 😀 bear"
    tokens = byte_level_bpe().encode(text).ids
    stops = ["brown bear", "😀😀"]
    for count in range(1, len(tokens)):
        call = world.stub.Generate(pb.GenerateRequest(text="the fox", stop=pb.StopConditions(stop_strings=stops)))
        submit = await world.core.hear(ipc.Submit)
        world.core.admit(submit)
        world.core.outputs(submit.streams[0], tokens[:count])
        await world.stub.GetServer(pb.GetServerRequest())
        await next_core(world)
        again = await world.core.hear(ipc.Submit)
        assert held(again.progress[0]) == tokens[:count], "what the client was not told is held, too"
        world.core.finish(again, pb.FINISH_REASON_LENGTH, tokens[count:])
        assert joined(await rest(call)) == (tokens, text)


async def test_the_next_core_is_told_of_a_stop_string_that_the_dead_one_knew_of(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox", stop=pb.StopConditions(stop_strings=["quick"])))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    world.core.outputs(submit.streams[0], WORDS)
    await world.core.hear(ipc.Stop)
    await next_core(world)
    await world.core.hear(ipc.Submit)
    assert await world.core.hear(ipc.Stop) == ipc.Stop(submit.streams[0])
    world.core.finish(submit, pb.FINISH_REASON_STOP, WORDS)
    responses = await rest(call)
    assert joined(responses)[1] == "The "
    assert responses[-1].finished.stop_string == "quick"


async def test_a_stop_string_may_be_completed_by_the_next_cores_tokens(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox", stop=pb.StopConditions(stop_strings=["own f"])))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    tokenizer = byte_level_bpe()
    count = next(n for n in range(len(WORDS)) if tokenizer.decode(WORDS[:n]).endswith(("own", "own ")))
    world.core.outputs(submit.streams[0], WORDS[:count])
    await world.stub.GetServer(pb.GetServerRequest())
    await next_core(world)
    await world.core.hear(ipc.Submit)
    world.core.outputs(submit.streams[0], WORDS[count:])
    assert await world.core.hear(ipc.Stop) == ipc.Stop(submit.streams[0])
    world.core.finish(submit, pb.FINISH_REASON_STOP)
    responses = await rest(call)
    assert joined(responses)[1] == "The quick br"
    assert responses[-1].finished.stop_string == "own f"


async def test_log_probabilities_stay_with_their_tokens_and_those_of_the_prompt_come_once(world: World) -> None:
    output = pb.OutputOptions(logprobs=0, prompt_logprobs=0)
    call = world.stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=WORDS[:3]), output=output))
    submit = await world.core.hear(ipc.Submit)
    (stream,) = submit.streams
    world.core.admit(submit)
    await next_core(world)
    again = await world.core.hear(ipc.Submit)
    assert again.progress[0].lacks_prompt_logprobs
    numbers = np.array(WORDS[1:3], "<i4").tobytes()
    prompt = ipc.PromptLogprobs(stream, numbers, np.zeros(2, "<f4").tobytes(), numbers, 1)
    world.core.outputs(stream, WORDS[:2], prompt_logprobs=[prompt], logprobs=rows(stream, WORDS[:2]))
    responses = await read_tokens(call, 2)
    await next_core(world)
    again = await world.core.hear(ipc.Submit)
    assert not again.progress[0].lacks_prompt_logprobs
    world.core.outputs(stream, WORDS[2:6], logprobs=rows(stream, WORDS[2:6]))
    world.core.finish(again, pb.FINISH_REASON_LENGTH)
    responses += await rest(call)
    assert events_of(responses).count("prompt") == 1
    deltas = [response.delta for response in responses if response.HasField("delta")]
    assert [row.rank for delta in deltas for row in delta.logprobs] == WORDS[:6]


async def test_a_stop_token_that_the_next_core_brings_ends_the_stream(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    world.core.outputs(submit.streams[0], WORDS[:2])
    await read_tokens(call, 2)
    await next_core(world)
    world.core.finish(await world.core.hear(ipc.Submit), pb.FINISH_REASON_STOP, [WORDS[2], EOS], stop=EOS)
    responses = await rest(call)
    assert joined(responses)[0] == [WORDS[2], EOS]
    assert responses[-1].finished.stop_token_id == EOS


async def test_what_the_next_core_refuses_ends_the_stream_with_its_error(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    submit = await world.core.hear(ipc.Submit)
    await next_core(world)
    await world.core.hear(ipc.Submit)
    failed = ipc.Failed(submit.streams[0], "ABORTED", "Superseded", "elsewhere")
    world.core.outputs(submit.streams[0], failed=[failed])
    error = await failure(call)
    assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "elsewhere")


async def draining_becomes(world: World, draining: bool) -> None:
    while world.frontend.core.status is None or world.frontend.core.status.draining != draining:
        await world.frontend.core.changed.wait()


async def test_a_core_that_drained_is_followed_by_one_that_drains(world: World) -> None:
    world.core.set_status(msgspec.structs.replace(READY, draining=True))
    await draining_becomes(world, True)
    world.core.status = READY  # what the next core says of itself
    await next_core(world)
    assert (await world.core.hear(ipc.Drain)).limit_s is None
    assert (await world.stub.GetServer(pb.GetServerRequest())).draining
    world.core.set_status(msgspec.structs.replace(READY, draining=True))
    world.core.set_status(READY)  # somebody has cancelled it
    await draining_becomes(world, False)
    await next_core(world)
    call = world.stub.Generate(pb.GenerateRequest(text="the fox"))
    await world.core.hear(ipc.Submit)  # and no Drain before
    call.cancel()
