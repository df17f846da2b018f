"""Events put together: what is a whole stream, and what its output says."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

import duet
from duet import Client, Event, Logprob, Output, SamplingParams, StreamCut
from duet.stream_order import StreamOrder
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit.fake_inference import FakeInference, delta, finished, replay, started

REQUEST = pb.GenerateRequest(text="x")
BEGIN, END = started(REQUEST), finished(REQUEST, 3)
PROMPT = pb.GenerateResponse(prompt=pb.Prompt(token_ids=[5, 6], text="ab"))
FIRST, SECOND = delta(0, [1, 2]), delta(2, [3])


def taken(responses: Sequence[pb.GenerateResponse], num_choices: int = 1) -> list[Event]:
    order = StreamOrder(num_choices)
    events = [event for response in responses if (event := order.take(response)) is not None]
    order.end()
    return events


CUT = {
    "gap": [BEGIN, FIRST, delta(3, [3]), END],
    "repeat": [BEGIN, FIRST, FIRST, END],
    "no finish": [BEGIN, FIRST, SECOND],
    "no start": [FIRST, SECOND, END],
    "after finish": [BEGIN, FIRST, END, SECOND],
    "nothing": [],
    "two starts": [BEGIN, BEGIN, END],
    "two ends": [BEGIN, END, END],
    "end alone": [END],
    "empty": [BEGIN, pb.GenerateResponse(), END],
    "prompt first": [PROMPT, BEGIN, END],
    "two prompts": [BEGIN, PROMPT, PROMPT, END],
    "prompt after tokens": [BEGIN, FIRST, PROMPT, SECOND, END],
    "another choice": [BEGIN, FIRST, SECOND, delta(0, [1], index=1), END],
    "end of another choice": [BEGIN, FIRST, SECOND, finished(REQUEST, 3, index=1)],
}


@pytest.mark.parametrize("case", CUT)
def test_a_stream_that_is_not_whole_is_an_error(client: Client, service: FakeInference, case: str) -> None:
    with pytest.raises(StreamCut):
        taken(CUT[case])
    service.script = replay(*CUT[case])
    with pytest.raises(duet.StreamCut):
        client.generate("x")
    service.script = replay(BEGIN, PROMPT, FIRST, SECOND, END)
    assert client.generate("x").token_ids == [1, 2, 3]


@pytest.mark.parametrize(
    "responses",
    [
        [BEGIN, FIRST, delta(0, [1], index=1), END],
        [BEGIN, FIRST, delta(2, [1], index=1), END, finished(REQUEST, 1, index=1)],
        [BEGIN, FIRST, END, SECOND, finished(REQUEST, 1, index=1)],
        [BEGIN, END, finished(REQUEST, 1, index=2)],
    ],
    ids=["one has no end", "offsets of the other", "tokens after its own end", "one too many"],
)
def test_each_choice_is_watched_by_itself(responses: list[pb.GenerateResponse]) -> None:
    with pytest.raises(StreamCut):
        taken(responses, num_choices=2)


def test_choices_are_told_apart_however_they_are_mixed(client: Client, service: FakeInference) -> None:
    responses = [
        BEGIN,
        delta(0, [7], index=1),
        FIRST,
        delta(1, [8, 9], index=1),
        finished(REQUEST, 3, index=1),
        SECOND,
        END,
    ]
    service.script = replay(*responses)
    output = client.generate("x", SamplingParams(n=2))
    assert [choice.token_ids for choice in output.choices] == [[1, 2, 3], [7, 8, 9]]
    assert [choice.text for choice in output.choices] == ["<1><2><3>", "<7><8><9>"]
    assert [choice.index for choice in output.choices] == [0, 1]
    assert (output.index, output.text, output.token_ids) == (0, "<1><2><3>", [1, 2, 3])


def test_an_output_says_why_it_ended_and_what_was_counted() -> None:
    usage = pb.Usage(
        prompt_tokens=1,
        cached_tokens=2,
        output_tokens=3,
        preemptions=4,
        recoveries=5,
        queue_time_ns=6_000_000,
        time_to_first_token_ns=7_000_000,
    )
    reason = pb.FINISH_REASON_STOP
    end = pb.GenerateResponse(finished=pb.Finished(reason=reason, stop_string="</s>", usage=usage))
    output = Output.of(taken([BEGIN, FIRST, SECOND, end]))
    assert (output.finish_reason, output.stop_string, output.stop_token_id) == ("stop", "</s>", None)
    counts = (output.prompt_tokens, output.cached_tokens, output.output_tokens, output.preemptions, output.recoveries)
    assert counts == (1, 2, 3, 4, 5)
    assert output.queue_time_s == pytest.approx(0.006)
    assert output.time_to_first_token_s == pytest.approx(0.007)
    end = pb.GenerateResponse(finished=pb.Finished(reason=reason, stop_token_id=0))
    output = Output.of(taken([BEGIN, end]))
    assert (output.stop_string, output.stop_token_id) == (None, 0)
    assert (output.time_to_first_token_s, output.token_ids, output.logprobs) == (None, [], None)
    assert (output.prompt, output.prompt_token_ids, output.prompt_logprobs) == ("", [], None)


def logprobs(rank: int, logprob: float, *top: tuple[int, float, str]) -> pb.TokenLogprobs:
    alternatives = [pb.Alternative(token_id=token_id, logprob=value, text=text) for token_id, value, text in top]
    return pb.TokenLogprobs(logprob=logprob, rank=rank, top=alternatives)


def test_log_probabilities_are_those_of_vllm() -> None:
    """Of each position a dict from token to Logprob: the token that stands there first, then the likeliest by rank."""
    top = [(4, -0.25, "d"), (1, -1.5, "a")]
    tokens = pb.TokenDelta(token_ids=[1, 2], text="ab", logprobs=[logprobs(2, -1.5, *top), logprobs(9, -4.0, *top)])
    prompt = pb.Prompt(token_ids=[7, 4], logprobs=[pb.TokenLogprobs(), logprobs(1, -0.25, *top)])
    responses = [BEGIN, pb.GenerateResponse(prompt=prompt), pb.GenerateResponse(delta=tokens), END]
    output = Output.of(taken(responses))
    assert output.logprobs == [
        {1: Logprob(-1.5, 2, "a"), 4: Logprob(-0.25, 1, "d")},
        {2: Logprob(-4.0, 9, None), 4: Logprob(-0.25, 1, "d"), 1: Logprob(-1.5, 2, "a")},
    ]
    assert [next(iter(entry)) for entry in output.logprobs or []] == [1, 2]
    assert output.cumulative_logprob == -5.5
    assert output.prompt_token_ids == [7, 4]
    assert output.prompt_logprobs == [None, {4: Logprob(-0.25, 1, "d"), 1: Logprob(-1.5, 2, "a")}]


def test_an_echo_is_the_prompt(client: Client, service: FakeInference) -> None:
    service.script = replay(BEGIN, PROMPT, FIRST, SECOND, END)
    output = client.generate("x", echo=True)
    assert (output.prompt, output.prompt_token_ids, output.prompt_logprobs) == ("ab", [5, 6], None)


def test_a_dict_for_json_holds_the_choices_only_where_there_are_several() -> None:
    one = Output.of(taken([BEGIN, FIRST, SECOND, END]))
    assert (one.choices[0].text, one.as_dict()["text"]) == (one.text, one.text)
    assert "choices" not in one.as_dict()
    several = Output.of(taken([BEGIN, END, finished(REQUEST, 0, index=1)], num_choices=2))
    fields: dict[str, Any] = json.loads(json.dumps(several.as_dict()))
    assert [choice["index"] for choice in fields["choices"]] == [0, 1]
