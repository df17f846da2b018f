"""Our events as the gateway's messages."""

from collections.abc import Sequence
from typing import Any

import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.gateway.responses import Responses

STARTED = pb.GenerateResponse(started=pb.Started(request_id="r", prompt_tokens=3, cached_tokens=2))


def delta(token_ids: Sequence[int], index: int = 0, logprobs: Sequence[pb.TokenLogprobs] = ()) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.TokenDelta(index=index, token_ids=token_ids, text="no", logprobs=logprobs))


def finished(index: int = 0, reason: int = pb.FINISH_REASON_LENGTH, **fields: Any) -> pb.GenerateResponse:
    usage = pb.Usage(prompt_tokens=3, cached_tokens=2, output_tokens=4)
    return pb.GenerateResponse(
        finished=pb.Finished(index=index, reason=pb.FinishReason.Name(reason), usage=usage, **fields)
    )


def logprob(value: float, *top: tuple[int, float]) -> pb.TokenLogprobs:
    alternatives = [pb.Alternative(token_id=token_id, logprob=logprob) for token_id, logprob in top]
    return pb.TokenLogprobs(logprob=value, rank=1, top=alternatives)


def answered(
    events: Sequence[pb.GenerateResponse], *, stream: bool, request: pb.GenerateRequest | None = None
) -> list[Any]:
    """The messages without their envelopes."""
    responses = Responses(request or pb.GenerateRequest(), is_streamed=stream)
    messages = [message for event in events for message in responses.of(event)]
    return [getattr(message, message.WhichOneof("response")) for message in messages]


def columns(logprobs: vllm.OutputLogProbs) -> tuple[list[int], list[float], list[dict[int, float]]]:
    tops = [dict(zip(top.token_ids, top.values, strict=True)) for top in logprobs.top_logprobs]
    return list(logprobs.token_ids), list(logprobs.token_logprobs), tops


def test_a_stream_is_the_deltas_and_one_empty_end():
    first, second, end = answered([STARTED, delta([5, 6]), delta([7, 8]), finished()], stream=True)
    assert [list(chunk.token_ids) for chunk in (first, second)] == [[5, 6], [7, 8]]
    assert [chunk.completion_tokens for chunk in (first, second)] == [2, 2]
    assert {(chunk.prompt_tokens, chunk.cached_tokens) for chunk in (first, second)} == {(3, 2)}
    assert isinstance(end, vllm.GenerateComplete)
    assert list(end.output_ids) == []
    assert (end.finish_reason, end.prompt_tokens, end.completion_tokens, end.cached_tokens) == ("length", 3, 4, 2)


def test_an_answer_in_one_piece_holds_all_tokens():
    (whole,) = answered([STARTED, delta([5, 6]), delta([7, 8]), finished()], stream=False)
    assert isinstance(whole, vllm.GenerateComplete)
    assert list(whole.output_ids) == [5, 6, 7, 8]
    assert (whole.finish_reason, whole.prompt_tokens, whole.completion_tokens, whole.cached_tokens) == (
        "length",
        3,
        4,
        2,
    )


def test_choices_are_told_apart_in_a_stream():
    events = [STARTED, delta([5], 1), delta([6], 0), finished(1), delta([7], 0), finished(0)]
    messages = answered(events, stream=True)
    assert [message.index for message in messages] == [1, 0, 1, 0, 0]
    ends = [message for message in messages if isinstance(message, vllm.GenerateComplete)]
    assert [end.index for end in ends] == [1, 0]


def test_each_choice_in_one_piece_holds_its_own_tokens():
    events = [STARTED, delta([5], 1), delta([6], 0), finished(1), delta([7], 0), finished(0)]
    assert [(one.index, list(one.output_ids)) for one in answered(events, stream=False)] == [(1, [5]), (0, [6, 7])]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (pb.FINISH_REASON_STOP, "stop"),
        (pb.FINISH_REASON_LENGTH, "length"),
        (pb.FINISH_REASON_CANCELLED, "abort"),
    ],
)
def test_the_finish_reason_is_the_gateways_own_word(reason: int, told: str, stream: bool):
    assert answered([STARTED, finished(reason=reason)], stream=stream)[-1].finish_reason == told


def test_every_finish_reason_has_a_word():
    for reason in pb.FinishReason.values():
        if reason != pb.FINISH_REASON_UNSPECIFIED:
            assert answered([STARTED, finished(reason=reason)], stream=True)


def test_a_stop_string_is_told():
    (end,) = answered([STARTED, finished(reason=pb.FINISH_REASON_STOP, stop_string="lazy")], stream=True)
    assert (end.WhichOneof("matched_stop"), end.matched_stop_str) == ("matched_stop_str", "lazy")


def test_a_stop_token_of_the_request_is_told_and_the_models_own_is_not():
    request = pb.GenerateRequest(stop=pb.StopConditions(stop_token_ids=[0, 9]))
    for token_id, told in ((0, "matched_token_id"), (9, "matched_token_id"), (2, None)):
        event = finished(reason=pb.FINISH_REASON_STOP, stop_token_id=token_id)
        (end,) = answered([STARTED, event], stream=True, request=request)
        assert end.WhichOneof("matched_stop") == told
        assert told is None or end.matched_token_id == token_id


def test_the_end_by_length_matches_no_stop_token():
    request = pb.GenerateRequest(stop=pb.StopConditions(stop_token_ids=[0]))
    (end,) = answered([STARTED, finished()], stream=True, request=request)
    assert end.WhichOneof("matched_stop") is None


def test_log_probabilities_go_with_their_tokens():
    events = [
        STARTED,
        delta([5, 6], logprobs=[logprob(-0.5, (5, -0.5), (8, -2.0)), logprob(-3.0, (7, -0.25), (5, -1.0))]),
        delta([7], logprobs=[logprob(-0.25, (7, -0.25), (9, -4.0))]),
        finished(),
    ]
    first, second, end = answered(events, stream=True)
    tops = [{5: -0.5, 8: -2.0}, {7: -0.25, 5: -1.0}, {7: -0.25, 9: -4.0}]
    assert columns(first.output_logprobs) == ([5, 6], [-0.5, -3.0], tops[:2])
    assert columns(second.output_logprobs) == ([7], [-0.25], tops[2:])
    assert not end.HasField("output_logprobs")
    (whole,) = answered(events, stream=False)
    assert columns(whole.output_logprobs) == ([5, 6, 7], [-0.5, -3.0, -0.25], tops)


def test_without_log_probabilities_there_are_no_columns():
    messages = answered([STARTED, delta([5]), finished()], stream=True)
    messages += answered([STARTED, delta([5]), finished()], stream=False)
    assert not any(message.HasField("output_logprobs") for message in messages)
    assert not any(message.HasField("input_logprobs") for message in messages)


def test_log_probabilities_of_the_prompt_come_once_for_each_choice_and_lack_the_first():
    prompt = pb.Prompt(token_ids=[3, 4], logprobs=[pb.TokenLogprobs(), logprob(-1.5, (8, -0.5))])
    events = [STARTED, pb.GenerateResponse(prompt=prompt), delta([5], 0), delta([6], 1), delta([7], 0)]
    events += [finished(0), finished(1)]
    streamed = answered(events, stream=True)
    assert [message.HasField("input_logprobs") for message in streamed] == [True, True, False, False, False]
    for message in (*streamed[:2], *answered(events, stream=False)):
        logprobs = message.input_logprobs
        assert list(logprobs.token_ids) == [3, 4]
        first, second = logprobs.token_logprobs
        assert not first.HasField("value")
        assert second.value == -1.5
        assert [list(top.token_ids) for top in logprobs.top_logprobs] == [[], [8]]


def test_an_echoed_prompt_is_left_to_the_gateway():
    events = [STARTED, pb.GenerateResponse(prompt=pb.Prompt(token_ids=[3, 4], text="the")), delta([5]), finished()]
    assert not any(message.HasField("input_logprobs") for message in answered(events, stream=True))
