"""Requests over several calls: what is asked for, what is let through, whatever breaks wherever."""

import dataclasses
import random
from collections.abc import Iterator, Sequence

import pytest

from duet import Output, retry
from duet.delivery import Delivery
from duet.errors import DuetError, StreamCut, Unavailable
from duet.output import Event
from duet.stream_order import StreamOrder
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit.fake_inference import delta, finished, started

# Tokens that a server lets go together, and their text: a whole continuation is several of these.
Pieces = Sequence[tuple[list[int], str]]
SEED = 77


def response_of(event: Event) -> pb.GenerateResponse:
    (kind,) = (kind for kind in ("started", "prompt", "delta", "finished") if type(event) is _TYPES[kind])
    return pb.GenerateResponse(**{kind: event})  # pyright: ignore[reportArgumentType]


_TYPES = {"started": pb.Started, "prompt": pb.Prompt, "delta": pb.TokenDelta, "finished": pb.Finished}


@dataclasses.dataclass
class Server:
    """Knows what comes, and says it in other portions each time; where it resumes it may begin before that place."""

    continuations: Sequence[Pieces]
    rng: random.Random

    def answer(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        seed = request.sampling.seed if request.sampling.HasField("seed") else SEED
        responses = [pb.GenerateResponse(started=pb.Started(request_id=request.request_id, seed=seed))]
        if request.output.echo:
            responses.append(pb.GenerateResponse(prompt=pb.Prompt(text="p", token_ids=[1])))
        offsets = [request.resume_offset] if len(self.continuations) == 1 else [*request.resume_offsets]
        if not request.HasField("resume_offset") and not request.resume_offsets:
            offsets = [0] * len(self.continuations)
        queues = [list(self.choice(index, offset)) for index, offset in enumerate(offsets)]
        while queues := [queue for queue in queues if queue]:
            responses.append(self.rng.choice(queues).pop(0))
        return responses

    def choice(self, index: int, offset: int) -> Iterator[pb.GenerateResponse]:
        pieces = self.continuations[index]
        ends = [sum(len(token_ids) for token_ids, _ in pieces[: count + 1]) for count in range(len(pieces))]
        place = sum(end <= offset for end in ends)  # of the first piece that is wanted
        place = max(0, place - self.rng.randrange(4))
        while place < len(pieces):
            portion = pieces[place : place + self.rng.randint(1, 3)]
            token_ids = [token_id for more, _ in portion for token_id in more]
            message = delta(ends[place] - len(pieces[place][0]), token_ids, index)
            message.delta.text = "".join(text for _, text in portion)
            message.delta.logprobs.extend(pb.TokenLogprobs(logprob=-token_id, rank=1) for token_id in token_ids)
            yield message
            place += len(portion)
        yield finished(pb.GenerateRequest(), ends[-1], index)


def random_pieces(rng: random.Random) -> Pieces:
    texts = ["", "a", "aa", "ab", "é", "aaa"]
    return [
        ([rng.randrange(1, 100) for _ in range(rng.randint(1, 3))], rng.choice(texts)) for _ in range(rng.randint(1, 9))
    ]


def deliver(server: Server, request: pb.GenerateRequest) -> tuple[list[Event], int]:
    """The events that come through calls that are cut anywhere, and how many calls were needed."""
    delivery, events, num_calls = Delivery(request, None, None), [], 0
    while True:
        num_calls += 1
        responses = server.answer(delivery.request)
        try:
            for response in responses[: server.rng.randrange(len(responses) + 2)]:
                if (event := delivery.take(response)) is not None:
                    events.append(event)
            if server.rng.random() < 0.5:
                raise Unavailable("the server is gone")
            delivery.end()
            return events, num_calls
        except DuetError as failure:
            if delivery.delay_s(failure) is None:
                return events, num_calls


@pytest.mark.parametrize("num_choices", [1, 3])
def test_nothing_is_lost_or_twice_however_often_a_stream_breaks(
    num_choices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "MAX_BREAKS", 1000)
    most_calls = 0
    for seed in range(1000):
        rng = random.Random(seed)
        continuations = [random_pieces(rng) for _ in range(num_choices)]
        request = pb.GenerateRequest(detach_seconds=60, output=pb.OutputOptions(echo=True))
        if num_choices > 1:
            request.sampling.n = num_choices
        events, num_calls = deliver(Server(continuations, rng), request)
        most_calls = max(most_calls, num_calls)
        order = StreamOrder(num_choices)
        assert [order.take(response_of(event)) for event in events] == events  # one unbroken stream
        order.end()
        assert [type(event) for event in events[:2]] == [pb.Started, pb.Prompt]
        for choice, pieces in zip(Output.of(events).choices, continuations, strict=True):
            assert choice.token_ids == [token_id for token_ids, _ in pieces for token_id in token_ids]
            assert choice.text == "".join(text for _, text in pieces)
            assert choice.logprobs is not None
            assert [-entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True)] == (
                choice.token_ids
            )
    assert most_calls > 10


# --- what is asked for -------------------------------------------------------------------------------------------


REQUEST = pb.GenerateRequest(text="x", detach_seconds=9)
BEGIN = pb.GenerateResponse(started=pb.Started(request_id="mine", seed=SEED))


def broken_delivery(*responses: pb.GenerateResponse, num_choices: int = 1) -> Delivery:
    """One that took `responses` before its first call broke."""
    request = pb.GenerateRequest()
    request.CopyFrom(REQUEST)
    if num_choices > 1:
        request.sampling.n = num_choices
    delivery = Delivery(request, None, None)
    for response in responses:
        delivery.take(response)
    delivery.delay_s(Unavailable("gone"))
    return delivery


def test_the_same_message_is_sent_again_with_what_is_held_and_the_seed_that_was_drawn() -> None:
    delivery = broken_delivery(BEGIN, delta(0, [1, 2]), delta(2, [3]))
    wanted = pb.GenerateRequest(
        text="x",
        detach_seconds=9,
        request_id=delivery.request.request_id,
        resume_offset=3,
        sampling=pb.SamplingParams(seed=SEED),
    )
    assert delivery.request == wanted


def test_a_request_that_broke_before_it_said_anything_is_resumed_from_its_start() -> None:
    """It may have been heard, so without an offset its id could be in use."""
    request = broken_delivery().request
    assert request.HasField("resume_offset")
    assert request.resume_offset == 0
    assert not request.sampling.HasField("seed")


def test_with_several_choices_an_offset_is_told_for_each() -> None:
    told = [BEGIN, delta(0, [1, 2], index=2), delta(0, [3], index=0), finished(REQUEST, 1, index=0)]
    request = broken_delivery(*told, num_choices=3).request
    assert list(request.resume_offsets) == [1, 0, 2]
    assert not request.HasField("resume_offset")
    assert list(broken_delivery(num_choices=3).request.resume_offsets) == [0, 0, 0]


def test_an_id_is_drawn_for_each_request_that_has_none() -> None:
    ids = {broken_delivery().request.request_id for _ in range(20)}
    assert len(ids) == 20
    assert all(1 <= len(request_id) <= 128 for request_id in ids)
    named = pb.GenerateRequest(request_id="mine", detach_seconds=1)
    assert Delivery(named, None, None).request.request_id == "mine"
    assert not Delivery(pb.GenerateRequest(), None, None).request.HasField("request_id")


# --- what is let through -----------------------------------------------------------------------------------------


def texted(offset: int, token_ids: list[int], text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.TokenDelta(offset=offset, token_ids=token_ids, text=text))


def test_a_delta_that_was_held_is_dropped_and_one_that_goes_beyond_is_cut() -> None:
    delivery = broken_delivery(BEGIN, texted(0, [1], "a"), texted(1, [2, 3], "aa"))
    assert delivery.take(BEGIN) is None
    assert delivery.take(texted(0, [1], "a")) is None
    assert delivery.take(texted(1, [2, 3, 4, 5], "aaab")) == texted(3, [4, 5], "ab").delta
    assert delivery.take(texted(5, [6], "c")) == texted(5, [6], "c").delta


def test_a_delta_that_repeats_the_last_one_and_more_is_cut() -> None:
    delivery = broken_delivery(BEGIN, texted(0, [1, 2], "aa"), texted(2, [3], "a"))
    delivery.take(BEGIN)
    assert delivery.take(texted(2, [3, 4], "aab")) == texted(3, [4], "ab").delta


def test_where_the_texts_border_is_not_known_another_call_asks_from_the_start() -> None:
    """The third token's text may be "a" or "aa"."""
    delivery = broken_delivery(BEGIN, texted(0, [1, 2, 3], "aaa"))
    delivery.take(BEGIN)
    with pytest.raises(StreamCut, match="cannot be told") as caught:
        delivery.take(texted(2, [3, 4], "aaa"))
    delivery.delay_s(caught.value)
    assert delivery.request.resume_offset == 0
    delivery.take(BEGIN)
    assert delivery.take(texted(0, [1, 2, 3, 4], "aaaaa")) == texted(3, [4], "aa").delta
    delivery.delay_s(Unavailable("gone"))
    assert delivery.request.resume_offset == 4


def test_the_end_of_a_choice_that_had_ended_is_dropped() -> None:
    ends = [finished(REQUEST, 1, index=index) for index in range(2)]
    delivery = broken_delivery(BEGIN, delta(0, [1]), ends[0], delta(0, [2], index=1), num_choices=2)
    assert delivery.take(BEGIN) is None
    assert delivery.take(delta(0, [1])) is None
    assert delivery.take(ends[0]) is None
    assert delivery.take(ends[1]) == ends[1].finished
    delivery.end()


@pytest.mark.parametrize(
    "responses",
    [
        [BEGIN, delta(4, [5])],
        [BEGIN, delta(2, [3]), delta(2, [3])],
        [BEGIN, delta(0, [1]), delta(2, [3])],
        [BEGIN, BEGIN],
        [delta(3, [4])],
        [BEGIN, finished(REQUEST, 3), finished(REQUEST, 3)],
        [BEGIN, finished(REQUEST, 3), delta(3, [4])],
        [BEGIN, delta(3, [4], index=1)],
    ],
    ids=["gap", "twice", "gap in what is held", "two starts", "no start", "two ends", "after the end", "other choice"],
)
def test_a_call_that_resumes_is_watched_as_well(responses: list[pb.GenerateResponse]) -> None:
    delivery = broken_delivery(BEGIN, delta(0, [1, 2]), delta(2, [3]))
    with pytest.raises(StreamCut):
        [delivery.take(response) for response in responses]


def test_tokens_beyond_the_end_that_a_choice_had_before_are_a_cut() -> None:
    delivery = broken_delivery(BEGIN, delta(0, [1]), finished(REQUEST, 1), num_choices=2)
    delivery.take(BEGIN)
    with pytest.raises(StreamCut, match="had ended"):
        delivery.take(delta(1, [2]))


def test_a_break_after_the_last_event_needs_no_further_call() -> None:
    delivery = Delivery(pb.GenerateRequest(detach_seconds=1), None, None)
    for response in (started(REQUEST), delta(0, [1]), finished(REQUEST, 1)):
        delivery.take(response)
    assert delivery.delay_s(Unavailable("gone")) is None
