"""Requests that outlive their clients, and those that outlive a core, between raw front ends and an engine."""

import asyncio
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scheduler_service.ipc import Abandon, Cancel, CancelReply, Detach, Finished, Progress, Sampling, Stop
from tests.unit.core_harness import CANCELLED, LENGTH, STOP, continuation, row_logprobs
from tests.unit.engine_harness import FrontEnd, ScriptedExecutor, Setting

PROMPT = range(10)
KEPT: dict[str, Any] = {"request_id": "kept", "detach_s": 60.0}
RESUMED: dict[str, Any] = {**KEPT, "resumes": True}


@pytest.fixture
async def executor(setting: Setting) -> ScriptedExecutor:
    return await setting.start_executor()


@pytest.fixture
async def frontend(setting: Setting, executor: ScriptedExecutor) -> FrontEnd:
    frontend = await setting.connect()
    await frontend.ready()
    return frontend


async def tokens_of(frontend: FrontEnd, stream: int, count: int) -> None:
    await frontend.until(lambda: len(frontend.tokens.get(stream, ())) >= count)


def progress(
    token_ids: Sequence[int], *, index: int = 0, most: int = 30, end: Finished | None = None, **changes: Any
) -> Progress:
    told = Progress(
        choice_index=index,
        token_ids=array("i", token_ids).tobytes(),
        max_total_tokens=most,
        was_told_start=bool(token_ids),
        cached_tokens=4,
        queue_time_ns=5,
        first_token_time=time.monotonic() if token_ids else None,
        recoveries=1,
        lacks_prompt_logprobs=False,
        end=end,
    )
    return msgspec.structs.replace(told, **changes)


# --- detaching and resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["the client leaves", "the front end dies"])
async def test_a_detached_request_goes_on_and_is_told_from_its_start_to_whoever_resumes_it(
    setting: Setting, executor: ScriptedExecutor, frontend: FrontEnd, how: str
):
    frontend.submit(1, PROMPT, 30, **KEPT)
    await tokens_of(frontend, 1, 3)
    executor.going.clear()
    other = await setting.connect()
    if how == "the client leaves":
        frontend.send(Detach(1))
    else:
        await frontend.close()
    await other.until_load(lambda load: load.detached_requests == 1)
    executor.going.set()
    await other.until_load(lambda load: load.finished_requests_total == 1)
    other.submit(5, PROMPT, 30, **RESUMED)
    await other.until(lambda: other.ends)
    assert other.tokens[5] == continuation(PROMPT, 30)
    assert other.finish_reason(5) == LENGTH
    assert (other.started[5].prompt_tokens, other.started[5].seed) == (10, 0)
    assert (await other.load()).load.used_blocks == 0


async def test_a_stream_that_is_taken_over_ends_with_aborted_and_the_other_misses_nothing(
    setting: Setting, frontend: FrontEnd
):
    other = await setting.connect()
    frontend.submit(1, PROMPT, 200, **KEPT)
    await tokens_of(frontend, 1, 5)
    other.submit(1, PROMPT, 200, **RESUMED)
    await frontend.until(lambda: frontend.ends)
    assert frontend.error(1) == ("ABORTED", "Superseded")
    await other.until(lambda: other.ends)
    assert other.tokens[1] == continuation(PROMPT, 200)
    told = frontend.tokens[1]
    assert told == continuation(PROMPT, 200)[: len(told)]
    assert (await other.load()).load.prefill_tokens_total == 10, "nothing was computed twice"


async def test_a_front_end_may_take_over_from_itself(frontend: FrontEnd):
    frontend.submit(1, PROMPT, 200, **KEPT)
    await tokens_of(frontend, 1, 5)
    frontend.submit(2, PROMPT, 200, **RESUMED)
    frontend.send(Detach(1))  # the old client's leaving is heard late
    await frontend.until(lambda: len(frontend.ends) == 2)
    assert frontend.error(1) == ("ABORTED", "Superseded")
    assert frontend.tokens[2] == continuation(PROMPT, 200)
    assert (await frontend.load()).load.detached_requests == 1, "its result"


async def test_a_request_that_waits_is_resumed_while_it_waits(
    setting: Setting, executor: ScriptedExecutor, frontend: FrontEnd
):
    other = await setting.connect()
    executor.going.clear()
    for stream in range(10, 20):
        frontend.submit(stream, range(100 * stream, 100 * stream + 10), 5)
    frontend.submit(1, PROMPT, 5, **KEPT)
    await frontend.until_load(lambda load: load.waiting_requests + load.running_requests == 11)
    frontend.send(Detach(1))
    await frontend.until_load(lambda load: load.detached_requests == 1)
    other.submit(1, PROMPT, 5, **RESUMED)
    await other.until_load(lambda load: load.detached_requests == 0)
    assert not other.started
    executor.going.set()
    await other.until(lambda: other.ends)
    assert other.tokens[1] == continuation(PROMPT, 5)


async def test_a_result_can_be_had_again_and_again_until_it_expires(setting: Setting, frontend: FrontEnd):
    frontend.submit(1, PROMPT, 5, request_id="kept", detach_s=0.4)
    await frontend.until(lambda: frontend.ends)
    for stream in (2, 3):
        frontend.submit(stream, PROMPT, 5, request_id="kept", detach_s=0.4, resumes=True)
        await frontend.until(lambda stream=stream: stream in frontend.ends)
        assert frontend.tokens[stream] == continuation(PROMPT, 5)
        assert msgspec.structs.replace(frontend.ends[stream], stream=1) == frontend.ends[1]
    assert (await frontend.load()).load.finished_requests_total == 1, "it ran once"
    await frontend.until_load(lambda load: load.detached_requests == 0)
    frontend.submit(4, PROMPT, 5, request_id="kept", detach_s=0.4)
    await frontend.until(lambda: 4 in frontend.ends)
    assert frontend.tokens[4] == continuation(PROMPT, 5)


async def test_a_detached_request_ends_when_nobody_has_come_back_for_so_long(
    executor: ScriptedExecutor, frontend: FrontEnd
):
    executor.going.clear()
    frontend.submit(1, PROMPT, 200, request_id="kept", detach_s=0.2)
    await frontend.until_load(lambda load: load.running_requests == 1)
    frontend.send(Detach(1))
    await frontend.until_load(lambda load: load.running_requests == 0)
    load = (await frontend.load()).load
    assert (load.detached_requests, load.used_blocks, load.finished_requests_total) == (0, 0, 1)
    executor.going.set()
    frontend.submit(2, PROMPT, 5, request_id="kept")
    await frontend.until(lambda: frontend.ends)
    assert frontend.tokens[2] == continuation(PROMPT, 5), "the id is free"


async def test_a_request_whose_client_is_there_does_not_expire(executor: ScriptedExecutor, frontend: FrontEnd):
    executor.going.clear()
    frontend.submit(1, PROMPT, 20, request_id="kept", detach_s=0.05)
    await frontend.until_load(lambda load: load.running_requests == 1)
    frontend.send(Detach(1))
    frontend.submit(2, PROMPT, 20, request_id="kept", detach_s=0.05, resumes=True)
    await frontend.until(lambda: 2 in frontend.started)
    await asyncio.sleep(0.3)
    executor.going.set()
    await frontend.until(lambda: 2 in frontend.ends)
    assert frontend.tokens[2] == continuation(PROMPT, 20)


async def test_an_id_is_in_use_for_as_long_as_its_result_is_kept(frontend: FrontEnd):
    frontend.submit(1, PROMPT, 5, **KEPT)
    await frontend.until(lambda: frontend.ends)
    frontend.submit(2, PROMPT, 5, **KEPT)
    frontend.submit(3, PROMPT, 5, request_id="kept")
    await frontend.until(lambda: len(frontend.ends) == 3)
    assert frontend.error(2) == frontend.error(3) == ("ALREADY_EXISTS", "DuplicateRequest")


async def test_resuming_an_unknown_id_generates_anew(frontend: FrontEnd):
    frontend.submit(1, PROMPT, 5, **RESUMED)
    await frontend.until(lambda: frontend.ends)
    assert frontend.tokens[1] == continuation(PROMPT, 5)


async def test_a_request_that_does_not_outlive_its_client_is_not_resumed(
    executor: ScriptedExecutor, frontend: FrontEnd
):
    executor.going.clear()
    frontend.submit(1, PROMPT, 5, request_id="kept")
    frontend.submit(2, PROMPT, 5, **RESUMED)
    await frontend.until(lambda: 2 in frontend.ends)
    assert frontend.error(2) == ("INVALID_ARGUMENT", "InvalidRequest")
    executor.going.set()
    await frontend.until(lambda: 1 in frontend.ends)
    assert frontend.tokens[1] == continuation(PROMPT, 5), "whoever has it keeps it"


async def test_a_resumed_request_has_as_many_continuations_as_it_had(frontend: FrontEnd):
    frontend.submit(1, PROMPT, 5, streams=[1, 2], **KEPT)
    await frontend.until(lambda: len(frontend.ends) == 2)
    frontend.submit(3, PROMPT, 5, streams=[3, 4, 5], **RESUMED)
    await frontend.until(lambda: len(frontend.ends) == 5)
    assert frontend.error(3) == ("INVALID_ARGUMENT", "InvalidRequest")
    frontend.submit(6, PROMPT, 5, streams=[6, 7], **RESUMED)
    await frontend.until(lambda: len(frontend.ends) == 7)
    assert [frontend.tokens[6], frontend.tokens[7]] == [continuation(PROMPT, 5, index) for index in (0, 1)]


async def test_a_request_of_which_some_continuations_have_ended_is_resumed_whole(
    executor: ScriptedExecutor, frontend: FrontEnd
):
    first, second = continuation(PROMPT, 200, 0), continuation(PROMPT, 200, 1)
    stop = next(token for token in second if token not in first)
    frontend.submit(1, PROMPT, 200, streams=[1, 2], stop_token_ids=[stop], **KEPT)
    await frontend.until(lambda: 2 in frontend.ends)
    executor.going.clear()
    frontend.send(Detach(1))
    frontend.submit(3, PROMPT, 200, streams=[3, 4], stop_token_ids=[stop], **RESUMED)
    await frontend.until(lambda: 4 in frontend.ends)
    assert 3 not in frontend.ends
    executor.going.set()
    await frontend.until(lambda: 3 in frontend.ends)
    assert frontend.tokens[3] == first
    assert frontend.tokens[4] == second[: second.index(stop) + 1]
    assert (frontend.finish_reason(3), frontend.finish_reason(4)) == (LENGTH, STOP)


async def test_a_detached_request_is_cancelled_by_its_id_and_whoever_resumes_it_is_told(
    setting: Setting, executor: ScriptedExecutor, frontend: FrontEnd
):
    frontend.submit(1, PROMPT, 200, **KEPT)
    await tokens_of(frontend, 1, 3)
    executor.going.clear()
    frontend.send(Detach(1))
    other = await setting.connect()
    other.send(Cancel(7, "", "kept"))
    await other.until(lambda: other.replies)
    assert other.replies == [CancelReply(7, True)]
    executor.going.set()
    other.submit(1, PROMPT, 200, **RESUMED)
    await other.until(lambda: other.ends)
    assert other.finish_reason(1) == CANCELLED


async def test_log_probabilities_are_told_again_with_their_tokens(setting: Setting, frontend: FrontEnd):
    sampling = Sampling(logprobs=2, prompt_logprobs=1)
    frontend.submit(1, PROMPT, 20, sampling=sampling, streams=[1, 2], **KEPT)
    await tokens_of(frontend, 1, 5)
    other = await setting.connect()
    other.submit(3, PROMPT, 20, sampling=sampling, streams=[3, 4], **RESUMED)
    await other.until(lambda: len(other.ends) == 2)
    assert other.prompt_logprobs.keys() == {3}
    for index, stream in enumerate((3, 4)):
        tokens = continuation(PROMPT, 20, index)
        assert other.tokens[stream] == tokens
        assert [row.rank for row in other.logprobs[stream]] == [
            row_logprobs(10 + position, token, 3).rank for position, token in enumerate(tokens)
        ]


async def test_ids_of_tenants_are_their_own(executor: ScriptedExecutor, frontend: FrontEnd):
    executor.going.clear()
    for stream, tenant in enumerate(("", "red", "blue")):
        frontend.submit(stream, range(100 * stream, 100 * stream + 10), 5, tenant=tenant, **KEPT)
    await frontend.until_load(lambda load: load.waiting_requests + load.running_requests == 3)
    frontend.send(Cancel(7, "green", "kept"))
    frontend.send(Cancel(8, "red", "kept"))
    await frontend.until(lambda: len(frontend.replies) == 2)
    assert frontend.replies == [CancelReply(7, False), CancelReply(8, True)]
    frontend.submit(5, range(200, 210), 5, tenant="blue", **RESUMED)
    frontend.submit(6, range(600, 610), 5, tenant="green", **RESUMED)
    executor.going.set()
    await frontend.until(lambda: len(frontend.ends) == 5)
    assert frontend.finish_reason(1) == CANCELLED
    assert frontend.error(2) == ("ABORTED", "Superseded")
    assert frontend.tokens[5] == continuation(range(200, 210), 5)
    assert frontend.tokens[6] == continuation(range(600, 610), 5), "another tenant's id is unknown: generated anew"
    assert frontend.tokens[0] == continuation(range(10), 5)


async def test_detached_requests_go_on_over_the_loss_of_an_executor(
    setting: Setting, executor: ScriptedExecutor, frontend: FrontEnd
):
    frontend.submit(1, PROMPT, 200, **KEPT)
    await tokens_of(frontend, 1, 5)
    executor.going.clear()
    frontend.send(Detach(1))
    await frontend.until_load(lambda load: load.detached_requests == 1)
    await setting.kill_executor()
    await setting.start_executor()
    frontend.submit(2, PROMPT, 200, **RESUMED)
    await frontend.until(lambda: 2 in frontend.ends)
    assert frontend.tokens[2] == continuation(PROMPT, 200)


# --- another core ------------------------------------------------------------------------------------------------


async def test_a_request_of_a_dead_core_goes_on_after_what_its_front_end_holds(frontend: FrontEnd):
    told = continuation(PROMPT, 7)
    frontend.submit(1, PROMPT, None, progress=[progress(told)])
    await frontend.until(lambda: 1 in frontend.tokens or frontend.ends, started={1})
    await frontend.until(lambda: frontend.ends)
    assert frontend.tokens[1] == continuation(PROMPT, 20)[7:], "none lost, none twice"
    end = frontend.ends[1]
    assert isinstance(end, Finished)
    assert (end.reason, end.output_tokens, end.recoveries) == (LENGTH, 20, 1)
    assert (end.cached_tokens, end.queue_time_ns) == (4, 5)


async def test_a_request_that_had_not_started_starts_once(frontend: FrontEnd):
    frontend.submit(1, PROMPT, None, progress=[progress([])])
    await frontend.until(lambda: frontend.ends)
    assert frontend.started[1].prompt_tokens == 10
    assert frontend.tokens[1] == continuation(PROMPT, 20)


async def test_resubmissions_are_taken_however_many_wait_and_although_the_core_drains(tmp_path: Path):
    setting = Setting(tmp_path, max_waiting=2)
    try:
        await setting.start_executor()
        await setting.kill_executor()
        frontend = await setting.connect()
        setting.core.pool.is_draining = True
        for stream in range(1, 6):
            frontend.submit(stream, range(100 * stream, 100 * stream + 10), None, progress=[progress([])])
        await setting.start_executor()
        await frontend.until(lambda: len(frontend.ends) == 5)
        for stream in range(1, 6):
            assert frontend.tokens[stream] == continuation(range(100 * stream, 100 * stream + 10), 20)
    finally:
        await setting.stop()


async def test_of_several_continuations_those_that_have_ended_stay_ended(frontend: FrontEnd):
    tokens = [continuation(PROMPT, 20, index) for index in range(3)]
    ended = Finished(2, STOP, tokens[1][3], 10, 0, 4, 0, 0)
    parts = [progress(tokens[0][:5]), progress(tokens[1][:4], index=1, end=ended), progress(tokens[2][:6], index=2)]
    frontend.submit(1, PROMPT, None, streams=[1, 2, 3], progress=parts, **KEPT)
    await frontend.until(lambda: len(frontend.ends) == 2, started={1, 2, 3})
    assert (frontend.tokens[1], frontend.tokens[3]) == (tokens[0][5:], tokens[2][6:])
    assert 2 not in frontend.ends, "it was told already"
    frontend.submit(4, PROMPT, None, streams=[4, 5, 6], **RESUMED)
    await frontend.until(lambda: len(frontend.ends) == 5)
    assert [frontend.tokens[4], frontend.tokens[5], frontend.tokens[6]] == [tokens[0], tokens[1][:4], tokens[2]]
    assert msgspec.structs.replace(frontend.ends[5], stream=2) == ended


@pytest.mark.parametrize("first_has_more", [False, True])
@pytest.mark.parametrize("first_asked_later", [False, True])
async def test_of_two_front_ends_that_bring_one_request_the_longer_tokens_win_and_who_asked_last_has_it(
    setting: Setting, executor: ScriptedExecutor, frontend: FrontEnd, first_has_more: bool, first_asked_later: bool
):
    """A client went from one front end to another just before the core died."""
    executor.going.clear()
    other, tokens, now = await setting.connect(), continuation(PROMPT, 20), time.monotonic()
    fewer, more = progress(tokens[:4]), progress(tokens[:9])
    brought = (more, fewer) if first_has_more else (fewer, more)
    arrivals = (now, now - 1) if first_asked_later else (now - 1, now)
    for number, one in enumerate((frontend, other)):
        one.submit(1, PROMPT, None, progress=[brought[number]], arrival=arrivals[number], **KEPT)
        await one.until(lambda: True, started={1})
        await one.until_load(lambda load: load.waiting_requests + load.running_requests == 1)
    has_it, lost_it = (frontend, other) if first_asked_later else (other, frontend)
    await lost_it.until(lambda: lost_it.ends, started={1})
    assert lost_it.error(1) == ("ABORTED", "Superseded")
    executor.going.set()
    await has_it.until(lambda: has_it.ends, started={1})
    num_held = len(brought[0 if first_asked_later else 1].token_ids) // 4
    assert has_it.tokens[1] == tokens[num_held:], "none lost, none twice"
    assert (await has_it.load()).load.output_tokens_total == 11, "the longer of both was gone on from"


async def test_a_resubmission_of_what_a_core_still_has_is_told_what_it_lacks(
    setting: Setting, executor: ScriptedExecutor, frontend: FrontEnd
):
    """A front end was cut off, and its core lives."""
    frontend.submit(1, PROMPT, 20, **KEPT)
    await tokens_of(frontend, 1, 9)
    executor.going.clear()
    known = list(frontend.tokens[1])
    await frontend.close()
    again = await setting.connect()
    again.submit(1, PROMPT, 20, progress=[progress(known[:4])], **KEPT)
    executor.going.set()
    await again.until(lambda: again.ends, started={1})
    assert again.tokens[1] == continuation(PROMPT, 20)[4:]


async def test_a_stop_string_that_the_dead_core_was_told_of_ends_the_request_at_the_next(
    executor: ScriptedExecutor, frontend: FrontEnd
):
    executor.going.clear()
    frontend.submit(1, PROMPT, None, progress=[progress(continuation(PROMPT, 5))])
    frontend.send(Stop(1))
    await frontend.until(lambda: frontend.ends, started={1})
    assert frontend.finish_reason(1) == STOP


async def test_prompt_log_probabilities_that_were_not_told_come_before_every_token(frontend: FrontEnd):
    sampling = Sampling(logprobs=1, prompt_logprobs=1)
    parts = [progress([], lacks_prompt_logprobs=True), progress([], index=1)]
    frontend.submit(1, PROMPT, None, sampling=sampling, streams=[1, 2], progress=parts)
    await frontend.until(lambda: len(frontend.ends) == 2)
    assert frontend.prompt_logprobs.keys() == {1}
    for index, stream in enumerate((1, 2)):
        assert frontend.tokens[stream] == continuation(PROMPT, 20, index)


async def test_what_a_dead_core_had_expires_and_is_abandoned_like_anything_else(
    executor: ScriptedExecutor, frontend: FrontEnd
):
    executor.going.clear()
    frontend.submit(1, PROMPT, None, progress=[progress([])], request_id="kept", detach_s=0.1)
    frontend.submit(2, range(100, 110), None, progress=[progress([])])
    await frontend.until_load(lambda load: load.waiting_requests + load.running_requests == 2)
    frontend.send(Detach(1))
    frontend.send(Abandon(2))
    await frontend.until_load(lambda load: load.waiting_requests + load.running_requests == 0)
    executor.going.set()
    await frontend.until_load(lambda load: load.used_blocks == 0)
