"""Stop strings: what the client reads, what the core is told, what is counted."""

from collections.abc import Sequence

import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from tests.contract.frontend_harness import WORDS, World, events_of, joined, rest
from tests.small_model import EOS, byte_level_bpe

TEXT = "The quick brown fox jumps over the lazy dog."


def request(stops: Sequence[str], **stop: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="the fox", stop=pb.StopConditions(stop_strings=stops, **stop))  # pyright: ignore


def num_tokens_up_to(text: str) -> int:
    """Tokens of WORDS until their text holds `text`."""
    return next(count for count in range(len(WORDS) + 1) if text in byte_level_bpe().decode(WORDS[:count]))


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["fox", "own fo", " ", "The", TEXT])
async def test_the_text_ends_at_the_stop_string_and_the_tokens_with_the_one_that_completed_it(
    world: World, stop: str, include: bool
) -> None:
    call = world.stub.Generate(request([stop], include_stop_string=include))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    responses = [await call.read()]
    for token_id in WORDS:
        world.core.outputs(submit.streams[0], [token_id])
    assert await world.core.hear(ipc.Stop) == ipc.Stop(submit.streams[0])
    world.core.outputs(submit.streams[0], WORDS)  # generated before the core heard it
    world.core.finish(submit, pb.FINISH_REASON_STOP)
    responses += await rest(call)
    count = num_tokens_up_to(stop)
    cut = TEXT.find(stop) + (len(stop) if include else 0)
    assert joined(responses) == (WORDS[:count], TEXT[:cut])
    finished = responses[-1].finished
    assert (finished.reason, finished.stop_string) == (pb.FINISH_REASON_STOP, stop)
    assert not finished.HasField("stop_token_id")
    assert finished.usage.output_tokens == count
    assert (finished.usage.preemptions, finished.usage.time_to_first_token_ns) == (6, 9)


async def test_the_completed_string_is_the_end_whatever_the_core_found_meanwhile(world: World) -> None:
    """Tokens and the core's own end come in one frame: the core had not been told of the string yet."""
    call = world.stub.Generate(request(["fox"]))
    submit = await world.core.hear(ipc.Submit)
    world.core.finish(submit, pb.FINISH_REASON_STOP, [*WORDS, EOS], stop=EOS)
    responses = await rest(call)
    assert joined(responses) == (WORDS[: num_tokens_up_to("fox")], "The quick brown ")
    finished = responses[-1].finished
    assert (finished.stop_string, finished.HasField("stop_token_id")) == ("fox", False)
    await world.stub.GetServer(pb.GetServerRequest())  # goes after a Stop on the same socket
    assert world.core.heard.empty()


async def test_the_start_of_a_stop_string_is_held_back_until_it_is_something_else(world: World) -> None:
    call = world.stub.Generate(request(["brown bear"]))
    submit = await world.core.hear(ipc.Submit)
    cut = num_tokens_up_to("quick ") - 1  # " brown" may be one token: what is safe ends before its word
    safe = byte_level_bpe().decode(WORDS[:cut])
    until = num_tokens_up_to("brown")
    world.core.outputs(submit.streams[0], WORDS[:until])
    first = await call.read()
    assert TEXT.startswith(first.delta.text)
    assert len(safe) <= len(first.delta.text) <= len("The quick ")
    world.core.outputs(submit.streams[0], WORDS[until:])
    second = await call.read()
    assert second.delta.offset == len(first.delta.token_ids)
    assert joined([first, second]) == (WORDS, TEXT)
    world.core.finish(submit, pb.FINISH_REASON_LENGTH)
    assert events_of(await rest(call)) == ["finished"]


async def test_what_is_held_back_goes_out_with_a_stop_token_or_the_end(world: World) -> None:
    for last, stop in (([EOS], EOS), ([], None)):
        call = world.stub.Generate(request(["dog. The end"]))
        submit = await world.core.hear(ipc.Submit)
        reason = pb.FINISH_REASON_LENGTH if stop is None else pb.FINISH_REASON_STOP
        world.core.finish(submit, reason, [*WORDS, *last], stop=stop)
        responses = await rest(call)
        assert joined(responses) == ([*WORDS, *last], TEXT)
        finished = responses[-1].finished
        assert (finished.reason, finished.HasField("stop_string")) == (reason, False)
        assert finished.usage.output_tokens == 5  # as the core counted


async def test_a_stop_string_within_the_first_tokens_does_not_count(world: World) -> None:
    first = num_tokens_up_to("o")
    call = world.stub.Generate(request(["o"], min_tokens=first, max_tokens=100))
    submit = await world.core.hear(ipc.Submit)
    assert submit.sampling.min_tokens == first
    for token_id in WORDS:
        world.core.outputs(submit.streams[0], [token_id])
    assert await world.core.hear(ipc.Stop) == ipc.Stop(submit.streams[0])
    world.core.finish(submit, pb.FINISH_REASON_STOP)
    settled = len(byte_level_bpe().decode(WORDS[:first]))
    assert joined(await rest(call))[1] == TEXT[: TEXT.find("o", settled)]


async def test_a_client_that_leaves_after_a_stop_string_abandons_the_request(world: World) -> None:
    call = world.stub.Generate(request(["fox"]))
    submit = await world.core.hear(ipc.Submit)
    world.core.outputs(submit.streams[0], WORDS)
    await call.read()
    assert await world.core.hear(ipc.Stop) == ipc.Stop(submit.streams[0])
    call.cancel()
    assert await world.core.hear(ipc.Abandon) == ipc.Abandon(submit.streams[0])
