"""Detached requests, resumed through any front end: real front ends and a real core, an executor that speaks a text."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from tests.contract.frontend_harness import details, events_of, failure, joined, rest
from tests.contract.service_harness import TEXT, TOKENS, Service, deltas_of, read_until, running_service
from tests.small_model import byte_level_bpe

COUNT = 60
WHOLE = byte_level_bpe().decode(TOKENS[:COUNT])


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with running_service(tmp_path) as service:
        yield service


def request(**fields: Any) -> pb.GenerateRequest:
    stop = fields.pop("stop", pb.StopConditions(max_tokens=COUNT, ignore_eos=True))
    return pb.GenerateRequest(
        **{"text": "the fox", "request_id": "mine", "detach_seconds": 60.0, "stop": stop, **fields}
    )


async def leave(service: Service, call: Any) -> None:
    """The client goes, and the core has heard of it."""
    call.cancel()
    await service.until_load(detached_requests=1)


def held_then(responses: list[pb.GenerateResponse], offset: int, tokens: list[int], text: str) -> None:
    """Whoever holds `offset` tokens and their text has all of both after these responses.

    What comes begins at the offset, or before it where the text up to there was not a whole one.
    """
    deltas = deltas_of(responses)
    if not deltas:
        assert offset >= len(tokens)
        return
    first = deltas[0].offset
    assert first <= offset
    assert first + len(deltas[0].token_ids) > offset, "whole deltas that the client has are not sent"
    position = first
    for delta in deltas:
        assert delta.offset == position, "no gap and nothing twice"
        position += len(delta.token_ids)
    news, more = joined(responses)
    assert news == tokens[first:]
    assert more
    assert text.endswith(more)
    if first < offset:
        assert len(text) - len(more) <= len(byte_level_bpe().decode(tokens[:offset]))


async def test_a_client_that_lost_its_connection_goes_on_through_another_front_end(service: Service) -> None:
    one, other = service.fronts
    call = one.stub.Generate(request())
    responses = await read_until(call, 3)
    count, text = sum(len(delta.token_ids) for delta in deltas_of(responses)), joined(responses)[1]
    await leave(service, call)
    again = await rest(other.stub.Generate(request(resume_offset=count)))
    assert events_of(again)[0] == "started"
    assert again[0].started.seed == responses[0].started.seed, "the request's own"
    assert deltas_of(again)[0].offset == count
    assert text + joined(again)[1] == WHOLE
    assert again[-1].finished.reason == pb.FINISH_REASON_LENGTH
    assert again[-1].finished.usage.output_tokens == COUNT
    await service.until_load(running_requests=0, prefill_tokens_total=again[0].started.prompt_tokens)


async def test_a_client_whose_front_end_died_goes_on_through_another(service: Service) -> None:
    one, other = service.fronts
    service.executor.going.clear()
    call = one.stub.Generate(request())
    await service.until_load(running_requests=1)
    await one.kill()
    await service.until_load(detached_requests=1)
    service.executor.going.set()
    again = await rest(other.stub.Generate(request(resume_offset=0)))
    assert joined(again) == (TOKENS[:COUNT], WHOLE)
    assert call.done()


@pytest.mark.parametrize("stop_strings", [[], ["brown bear", "😀 fix", "👩‍🚀 under"], ["jump 👩‍🚀 ov"]])
async def test_a_result_is_resumed_at_every_offset_with_whole_characters(
    service: Service, stop_strings: list[str]
) -> None:
    stop = pb.StopConditions(max_tokens=COUNT, ignore_eos=True, stop_strings=stop_strings)
    one, other = service.fronts
    told = await rest(one.stub.Generate(request(stop=stop)))
    tokens, text = joined(told)
    if stop_strings != ["jump 👩‍🚀 ov"]:
        assert (tokens, text) == (TOKENS[:COUNT], WHOLE)
    else:
        assert text == WHOLE[: WHOLE.index(stop_strings[0])]
        assert told[-1].finished.stop_string == stop_strings[0]
    for offset in range(len(tokens) + 3):
        again = await rest(other.stub.Generate(request(stop=stop, resume_offset=offset)))
        assert events_of(again)[0] == "started"
        held_then(again, offset, tokens, text)
        assert again[-1].finished.reason == told[-1].finished.reason
        assert again[-1].finished.stop_string == told[-1].finished.stop_string
        assert again[-1].finished.usage.output_tokens == len(tokens)


@pytest.mark.parametrize("stop_strings", [[], ["brown bear", "😀 fix", "👩‍🚀 under"]])
async def test_a_running_request_is_resumed_at_every_delta_that_a_client_may_have(
    service: Service, stop_strings: list[str]
) -> None:
    """Whatever a client was told, what it is told next continues it: text for text, token for token."""
    stop = pb.StopConditions(max_tokens=COUNT, ignore_eos=True, stop_strings=stop_strings)
    tokens, text, front = list[int](), "", 0
    while len(tokens) < COUNT:
        resumed = {"resume_offset": len(tokens)} if front else {}
        call = service.fronts[front % 2].stub.Generate(request(stop=stop, **resumed))
        response = await call.read()
        while not response.HasField("delta"):
            response = await call.read()
        assert response.delta.offset == len(tokens)
        tokens += response.delta.token_ids
        text += response.delta.text
        call.cancel()
        front += 1
    assert (tokens, text) == (TOKENS[:COUNT], WHOLE)


async def test_a_stream_that_is_taken_over_ends_with_aborted(service: Service) -> None:
    one, other = service.fronts
    service.executor.going.clear()
    first = one.stub.Generate(request())
    await service.until_load(running_requests=1)
    second = other.stub.Generate(request(resume_offset=0))
    error = await failure(first)
    assert error.code() is grpc.StatusCode.ABORTED
    assert details(error)["ErrorInfo"].reason == "Superseded"
    service.executor.going.set()
    assert joined(await rest(second)) == (TOKENS[:COUNT], WHOLE)


async def test_several_continuations_are_resumed_each_from_its_own_offset(service: Service) -> None:
    one, other = service.fronts
    sampling = pb.SamplingParams(n=3)
    await rest(one.stub.Generate(request(sampling=sampling)))
    again = await rest(other.stub.Generate(request(sampling=sampling, resume_offsets=[0, 17, COUNT])))
    for index, offset in enumerate([0, 17, COUNT]):
        deltas = deltas_of(again, index)
        tokens = [token_id for delta in deltas for token_id in delta.token_ids]
        first = deltas[0].offset if deltas else COUNT
        assert offset - 4 <= first <= offset, "a character has four bytes at most"
        assert tokens == TOKENS[index + first : index + COUNT]
    assert sorted(one.finished.index for one in again if one.HasField("finished")) == [0, 1, 2]


async def test_log_probabilities_and_the_prompt_come_with_what_is_resumed(service: Service) -> None:
    one, other = service.fronts
    output = pb.OutputOptions(logprobs=1, prompt_logprobs=1, echo=True)
    told = await rest(one.stub.Generate(request(output=output)))
    rows = [row for delta in deltas_of(told) for row in delta.logprobs]
    for offset in (0, 1, 23, COUNT):
        again = await rest(other.stub.Generate(request(output=output, resume_offset=offset)))
        assert events_of(again)[:2] == ["started", "prompt"]
        assert again[1] == told[1]
        deltas = deltas_of(again)
        first = deltas[0].offset if deltas else COUNT
        assert [row for delta in deltas for row in delta.logprobs] == rows[first:]


async def test_a_request_nobody_comes_back_for_ends_and_its_result_is_forgotten(service: Service) -> None:
    one, other = service.fronts
    service.executor.going.clear()
    call = one.stub.Generate(request(detach_seconds=0.1))
    await service.until_load(running_requests=1)
    call.cancel()
    await service.until_load(running_requests=0, finished_requests_total=1)
    service.executor.going.set()
    assert joined(await rest(other.stub.Generate(request(detach_seconds=0.1))))[0] == TOKENS[:COUNT]
    await service.until_load(detached_requests=0)
    await rest(other.stub.Generate(request(detach_seconds=0.1)))


async def test_an_id_is_in_use_while_its_request_lives_or_its_result_is_kept(service: Service) -> None:
    one, other = service.fronts
    service.executor.going.clear()
    call = one.stub.Generate(request())
    await service.until_load(running_requests=1)
    assert (await failure(other.stub.Generate(request()))).code() is grpc.StatusCode.ALREADY_EXISTS
    service.executor.going.set()
    await rest(call)
    error = await failure(other.stub.Generate(request(detach_seconds=None)))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_resuming_an_unknown_id_generates_anew_and_tells_what_the_client_lacks(service: Service) -> None:
    again = await rest(service.fronts[0].stub.Generate(request(resume_offset=17)))
    assert events_of(again)[0] == "started"
    held_then(again, 17, TOKENS[:COUNT], WHOLE)
    await service.until_load(output_tokens_total=COUNT)


async def test_ids_of_tenants_are_their_own(service: Service) -> None:
    one, other = service.fronts
    red, blue = (("duet-tenant", "red"),), (("duet-tenant", "blue"),)
    service.executor.going.clear()
    calls = [one.stub.Generate(request(), metadata=metadata) for metadata in (red, blue, ())]
    await service.until_load(alive=3)
    error = await failure(other.stub.Cancel(pb.CancelRequest(request_id="mine"), metadata=(("duet-tenant", "green"),)))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    await other.stub.Cancel(pb.CancelRequest(request_id="mine"), metadata=blue)
    service.executor.going.set()
    ends = [(await rest(call))[-1].finished.reason for call in calls]
    assert ends == [pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_CANCELLED, pb.FINISH_REASON_LENGTH]
    green = await rest(other.stub.Generate(request(resume_offset=0), metadata=(("duet-tenant", "green"),)))
    assert green[-1].finished.reason == pb.FINISH_REASON_LENGTH, "generated anew, not resumed"
    await service.until_load(finished_requests_total=4)
    resumed = await rest(other.stub.Generate(request(resume_offset=0), metadata=blue))
    assert resumed[-1].finished.reason == pb.FINISH_REASON_CANCELLED


async def test_a_tenants_name_has_an_end(service: Service) -> None:
    error = await failure(service.fronts[0].stub.Generate(request(), metadata=(("duet-tenant", "x" * 129),)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_without_detach_seconds_a_disconnect_cancels(service: Service) -> None:
    service.executor.going.clear()
    call = service.fronts[0].stub.Generate(request(detach_seconds=None))
    await service.until_load(running_requests=1)
    call.cancel()
    await service.until_load(running_requests=0, detached_requests=0, finished_requests_total=1)
    service.executor.going.set()


async def test_a_detached_request_goes_on_over_executor_and_core_as_long_as_somebody_holds_it(
    service: Service,
) -> None:
    one, other = service.fronts
    call = one.stub.Generate(request())
    service.executor.going.clear()
    responses = [await call.read()]
    await service.setting.kill_core()
    await service.setting.start_core()
    service.executor.going.set()
    responses += await rest(call)
    assert events_of(responses).count("started") == 1
    assert joined(responses) == (TOKENS[:COUNT], WHOLE)
    assert responses[-1].finished.usage.recoveries >= 1
    again = await rest(other.stub.Generate(request(resume_offset=11)))
    held_then(again, 11, TOKENS[:COUNT], WHOLE)


async def test_many_clients_that_come_and_go_leave_nothing_behind(service: Service) -> None:
    async def client(number: int) -> None:
        fields = {"request_id": f"client-{number}", "detach_seconds": 60.0}
        tokens, text = list[int](), ""
        for turn in range(200):
            resumed = {"resume_offset": len(tokens)} if turn else {}
            call = service.fronts[(number + turn) % 2].stub.Generate(request(**fields, **resumed))
            for _ in range(1 + (number + turn) % 3):
                response = await call.read()
                if response is grpc.aio.EOF or response.HasField("finished"):
                    assert (tokens, text) == (TOKENS[:COUNT], WHOLE)
                    return
                assert not response.HasField("delta") or response.delta.offset == len(tokens)
                tokens += response.delta.token_ids
                text += response.delta.text
            call.cancel()
        pytest.fail("it never came to the end")

    await asyncio.gather(*(client(number) for number in range(12)))
    await service.until_load(running_requests=0, waiting_requests=0, used_blocks=0)
    await service.until_load(idle_checks_total=1, idle_check_failures_total=0)
    assert TEXT.startswith(WHOLE)
