"""What a client may have reported beside the tokens: log-probabilities and the prompt."""

from collections.abc import Sequence

import numpy as np
import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service import ipc
from tests.contract.frontend_harness import WORDS, World, events_of, joined, rest
from tests.small_model import EOS, byte_level_bpe

FIRE = byte_level_bpe().encode("🜁").ids  # four tokens of one byte


def request(prompt: str = "the fox", **output: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=prompt, output=pb.OutputOptions(**output))  # pyright: ignore


def int32(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def float32(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def entries(stream: int, token_ids: Sequence[int], others: Sequence[int]) -> list[ipc.TokenLogprobs]:
    """Of each token: its own log-probability is minus its id, its rank its id; those of `others` fall from 0."""
    falling = [-0.5 * place for place in range(len(others))]
    return [
        ipc.TokenLogprobs(stream, int32(token_id, *others), float32(-token_id, *falling), token_id)
        for token_id in token_ids
    ]


def expected(token_id: int, others: Sequence[tuple[int, str]]) -> pb.TokenLogprobs:
    top = [
        pb.Alternative(token_id=other, logprob=-0.5 * place, text=text) for place, (other, text) in enumerate(others)
    ]
    return pb.TokenLogprobs(logprob=-token_id, rank=token_id, top=top)


def deltas_of(responses: Sequence[pb.GenerateResponse]) -> list[pb.TokenDelta]:
    return [response.delta for response in responses if response.HasField("delta")]


async def test_each_token_comes_with_its_own_log_probability_and_the_likeliest(world: World) -> None:
    call = world.stub.Generate(request(logprobs=3))
    submit = await world.core.hear(ipc.Submit)
    assert (submit.sampling.logprobs, submit.sampling.prompt_logprobs) == (3, None)
    others = [WORDS[1], EOS, FIRE[0]]  # a word in the middle of a text, a special token, a quarter of a character
    stream = submit.streams[0]
    world.core.outputs(stream, WORDS, logprobs=entries(stream, WORDS, others))
    world.core.finish(submit, pb.FINISH_REASON_LENGTH)
    (delta,) = deltas_of(await rest(call))
    word = byte_level_bpe().decode(WORDS[:2])[len(byte_level_bpe().decode(WORDS[:1])) :]
    texts = [(WORDS[1], word), (EOS, "<|im_end|>"), (FIRE[0], "\ufffd")]
    assert list(delta.logprobs) == [expected(token_id, texts) for token_id in WORDS]


async def test_without_alternatives_there_are_the_tokens_own(world: World) -> None:
    call = world.stub.Generate(request(logprobs=0))
    submit = await world.core.hear(ipc.Submit)
    stream = submit.streams[0]
    world.core.outputs(stream, WORDS, logprobs=entries(stream, WORDS, []))
    world.core.finish(submit, pb.FINISH_REASON_LENGTH)
    (delta,) = deltas_of(await rest(call))
    assert list(delta.logprobs) == [expected(token_id, []) for token_id in WORDS]


async def test_nothing_is_told_of_log_probabilities_that_were_not_asked_for(world: World) -> None:
    call = world.stub.Generate(request())
    submit = await world.core.hear(ipc.Submit)
    assert (submit.sampling.logprobs, submit.sampling.prompt_logprobs) == (None, None)
    world.core.finish(submit, pb.FINISH_REASON_LENGTH, WORDS)
    (delta,) = deltas_of(await rest(call))
    assert not delta.logprobs


async def test_log_probabilities_are_held_back_with_their_tokens(world: World) -> None:
    """Half a character, then the start of a stop string, then a stop token."""
    message = request(logprobs=0)
    message.stop.stop_strings.append("lazy cat")
    call = world.stub.Generate(message)
    submit = await world.core.hear(ipc.Submit)
    stream = submit.streams[0]
    token_ids = [*FIRE, *WORDS, *FIRE[:2], EOS]
    responses = []
    held = [len(FIRE) - 1, len(token_ids) - 4, len(token_ids)]  # each a part that ends in the middle of something
    for begin, end in zip([0, *held], held, strict=False):
        part = token_ids[begin:end]
        world.core.outputs(stream, part, logprobs=entries(stream, part, []))
        if begin:
            responses.append(await call.read())
    world.core.finish(submit, pb.FINISH_REASON_STOP, stop=EOS)
    responses += await rest(call)
    assert joined(responses)[0] == token_ids
    assert len(deltas_of(responses)) >= 2
    for delta in deltas_of(responses):
        assert [entry.rank for entry in delta.logprobs] == list(delta.token_ids)


async def test_log_probabilities_of_tokens_after_a_stop_string_are_dropped(world: World) -> None:
    message = request(logprobs=0)
    message.stop.stop_strings.append("fox")
    call = world.stub.Generate(message)
    submit = await world.core.hear(ipc.Submit)
    stream = submit.streams[0]
    world.core.outputs(stream, WORDS, logprobs=entries(stream, WORDS, []))
    world.core.finish(submit, pb.FINISH_REASON_STOP)
    (delta,) = deltas_of(await rest(call))
    assert len(delta.token_ids) < len(WORDS)
    assert [entry.rank for entry in delta.logprobs] == list(delta.token_ids)


# --- the prompt --------------------------------------------------------------------------------------------------


async def test_an_echo_comes_between_started_and_the_first_tokens(world: World) -> None:
    call = world.stub.Generate(request(echo=True))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    responses = [await call.read(), await call.read()]
    world.core.outputs(submit.streams[0], WORDS[:2])
    responses.append(await call.read())
    world.core.finish(submit, pb.FINISH_REASON_LENGTH, WORDS[2:])
    responses += await rest(call)
    assert events_of(responses) == ["started", "prompt", "delta", "delta", "finished"]
    token_ids = byte_level_bpe().encode("the fox").ids
    assert responses[1].prompt == pb.Prompt(token_ids=token_ids, text="the fox")


@pytest.mark.parametrize("skip", [True, False])
async def test_an_echo_is_the_prompt_as_rendered_and_truncated(world: World, skip: bool) -> None:
    conversation = pb.Chat(messages=[pb.ChatMessage(role="user", content="the fox")])
    output = pb.OutputOptions(echo=True, skip_special_tokens=skip)
    call = world.stub.Generate(pb.GenerateRequest(chat=conversation, output=output, truncate_prompt_tokens=12))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    world.core.finish(submit, pb.FINISH_REASON_LENGTH)
    prompt = (await rest(call))[1].prompt
    rendered = "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    token_ids = byte_level_bpe().encode(rendered).ids[-12:]
    assert np.frombuffer(submit.token_ids, "<i4").tolist() == token_ids
    assert list(prompt.token_ids) == token_ids
    assert prompt.text == byte_level_bpe().decode(token_ids, skip_special_tokens=skip)


def prompt_columns(stream: int, token_ids: Sequence[int], others: Sequence[int]) -> ipc.PromptLogprobs:
    rows = entries(stream, token_ids, others)
    return ipc.PromptLogprobs(
        stream,
        b"".join(row.token_ids for row in rows),
        b"".join(row.logprobs for row in rows),
        int32(*token_ids),
        1 + len(others),
    )


@pytest.mark.parametrize("echo", [True, False])
async def test_log_probabilities_of_the_prompt_come_once_before_the_tokens_of_any_choice(
    world: World, echo: bool
) -> None:
    message = request("The quick brown fox", prompt_logprobs=1, echo=echo)
    message.sampling.n = 2
    call = world.stub.Generate(message)
    submit = await world.core.hear(ipc.Submit)
    assert submit.sampling.prompt_logprobs == 1
    world.core.admit(submit)
    responses = [await call.read()]
    prompt_ids = byte_level_bpe().encode("The quick brown fox").ids
    columns = prompt_columns(submit.streams[0], prompt_ids[1:], [EOS])
    world.core.outputs(submit.streams[0], WORDS, prompt_logprobs=[columns])
    world.core.outputs(submit.streams[1], WORDS)
    for choice in range(2):
        world.core.finish(submit, pb.FINISH_REASON_LENGTH, choice=choice)
    responses += await rest(call)
    assert events_of(responses)[:3] == ["started", "prompt", "delta"]
    assert events_of(responses).count("started") == 1
    assert events_of(responses).count("prompt") == 1
    prompt = responses[1].prompt
    assert (list(prompt.token_ids), prompt.text) == (prompt_ids, "The quick brown fox" if echo else "")
    assert list(prompt.logprobs) == [
        pb.TokenLogprobs(),
        *(expected(token_id, [(EOS, "<|im_end|>")]) for token_id in prompt_ids[1:]),
    ]


async def test_a_prompt_of_one_token_has_one_empty_entry(world: World) -> None:
    tokens = pb.TokenIds(ids=[WORDS[0]])
    call = world.stub.Generate(pb.GenerateRequest(token_ids=tokens, output=pb.OutputOptions(prompt_logprobs=2)))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    columns = ipc.PromptLogprobs(submit.streams[0], b"", b"", b"", 3)
    world.core.outputs(submit.streams[0], WORDS, prompt_logprobs=[columns])
    world.core.finish(submit, pb.FINISH_REASON_LENGTH)
    assert list((await rest(call))[1].prompt.logprobs) == [pb.TokenLogprobs()]


async def test_a_request_that_ends_before_its_prompt_was_computed_has_no_prompt_event(world: World) -> None:
    call = world.stub.Generate(request(prompt_logprobs=0))
    submit = await world.core.hear(ipc.Submit)
    world.core.admit(submit)
    world.core.finish(submit, pb.FINISH_REASON_CANCELLED)
    assert events_of(await rest(call)) == ["started", "finished"]
