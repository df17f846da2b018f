"""Constrained requests through both services, judged by libraries that know nothing of grammars."""

import concurrent.futures
import json
import re
from collections.abc import Iterator
from typing import Any

import grpc
import jsonschema
import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from tests.e2e.system import PATIENCE_S, System, refusal_of

SEEDS = range(16)
ENDED, CUT = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
        "boss": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/short"}]},
    },
    "required": ["name", "age", "boss"],
    "additionalProperties": False,
    "$defs": {"short": {"type": "string", "pattern": "^[A-Z]{1,3}$"}},
}
EMAIL = r"[a-z]{1,8}@[a-z]{1,8}\.(com|org)"
COLOURS = ["red", "green", "greenish", "rot", "日本語", "two\nlines", '"quoted"']
SUM = 'start: term (("+" | "-") term){1,4}\nterm: /[1-9][0-9]{0,2}/ | "(" start ")"'


def request(seed: int, max_tokens: int = 300, **fields: Any) -> pb.GenerateRequest:
    made = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[3 + seed % 50, 7, 11 + seed, 19]),
        sampling=pb.SamplingParams(temperature=1.0, seed=seed),
        stop=pb.StopConditions(max_tokens=max_tokens),
    )
    made.MergeFrom(pb.GenerateRequest(**fields))
    return made


class Answer:
    """A stream that was read to its end."""

    def __init__(self, responses: Iterator[pb.GenerateResponse]) -> None:
        self.token_ids: dict[int, list[int]] = {}
        self.texts: dict[int, str] = {}
        self.finished: dict[int, pb.Finished] = {}
        self.deltas: list[pb.TokenDelta] = []
        for response in responses:
            if response.HasField("delta"):
                self.deltas.append(response.delta)
                index = response.delta.index
                self.token_ids.setdefault(index, []).extend(response.delta.token_ids)
                self.texts[index] = self.texts.get(index, "") + response.delta.text
            elif response.HasField("finished"):
                self.finished[response.finished.index] = response.finished

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def reason(self) -> int:
        return self.finished[0].reason


def ask(server: System, *requests: pb.GenerateRequest) -> list[Answer]:
    """All of them at once."""

    def ask_one(one: pb.GenerateRequest) -> Answer:
        return Answer(server.stub.Generate(one, timeout=PATIENCE_S))

    with concurrent.futures.ThreadPoolExecutor(max_workers=len(requests)) as pool:
        return list(pool.map(ask_one, requests))


def texts_of(server: System, least: int, **fields: Any) -> list[str]:
    """The texts that ended by themselves, of one request for each seed."""
    answers = ask(server, *(request(seed, **fields) for seed in SEEDS))
    texts = [answer.text for answer in answers if answer.reason == ENDED]
    assert all(answer.reason in (ENDED, CUT) for answer in answers)
    assert len(texts) >= least, "hardly any text came to its end"
    return texts


# --- languages -------------------------------------------------------------------------------------------------------


def test_json_of_a_schema_parses_and_validates(server: System):
    for text in texts_of(server, 12, constraint=pb.Constraint(json_schema=json.dumps(PERSON))):
        jsonschema.Draft202012Validator(PERSON).validate(json.loads(text))


def test_a_json_object_is_one(server: System):
    for text in texts_of(server, 1, constraint=pb.Constraint(json_object=pb.JsonObject()), max_tokens=1_000):
        assert isinstance(json.loads(text), dict)


def test_an_expression_is_matched_as_a_whole(server: System):
    texts = texts_of(server, len(SEEDS), constraint=pb.Constraint(regex=EMAIL))
    assert all(re.fullmatch(EMAIL, text) for text in texts)
    assert len(set(texts)) == len(texts)


def test_a_choice_is_one_of_its_texts_and_not_always_the_same(server: System):
    texts = texts_of(server, len(SEEDS), constraint=pb.Constraint(choice=pb.Choice(texts=COLOURS)))
    assert set(texts) <= set(COLOURS)
    assert len(set(texts)) > 1


def test_a_text_of_a_grammar_is_derived_from_it(server: System):
    for text in texts_of(server, 12, constraint=pb.Constraint(grammar=SUM)):
        assert re.fullmatch(r"[-+()0-9]+", text)
        assert re.search("[-+]", text)
        assert isinstance(eval(text), int)


def test_what_is_cut_by_max_tokens_is_the_beginning_of_a_text(server: System):
    long = pb.Constraint(regex="(ab){200}")
    for answer in ask(server, *(request(seed, max_tokens=9, constraint=long) for seed in SEEDS)):
        assert (answer.reason, len(answer.token_ids[0])) == (CUT, 9)
        assert ("ab" * 200).startswith(answer.text)


def test_greedy_and_penalised_texts_hold_as_well(server: System):
    constraint = pb.Constraint(regex=EMAIL)
    samplings = [
        pb.SamplingParams(temperature=0),
        pb.SamplingParams(temperature=100),
        pb.SamplingParams(top_k=1),
        pb.SamplingParams(top_p=0.01),
        pb.SamplingParams(min_p=1.0),
        pb.SamplingParams(repetition_penalty=50.0, frequency_penalty=2.0, presence_penalty=2.0),
        pb.SamplingParams(logit_bias=dict.fromkeys(range(100), 100.0)),
    ]
    for answer in ask(server, *(request(1, constraint=constraint, sampling=sampling) for sampling in samplings)):
        assert re.fullmatch(EMAIL, answer.text)
        assert answer.reason == ENDED


# --- beside others ---------------------------------------------------------------------------------------------------


def test_requests_get_the_same_tokens_alone_and_in_a_mixed_batch(server: System):
    constraints: list[dict[str, Any]] = [
        {},
        {"constraint": pb.Constraint(json_schema=json.dumps(PERSON))},
        {},
        {"constraint": pb.Constraint(regex=EMAIL)},
    ]
    requests = [request(seed, max_tokens=60, **constraints[seed % 4]) for seed in SEEDS]
    alone = [ask(server, one)[0].token_ids for one in requests]
    assert [answer.token_ids for answer in ask(server, *requests)] == alone


def test_choices_share_a_constraint_and_differ(server: System):
    (answer,) = ask(server, request(3, constraint=pb.Constraint(regex=EMAIL), sampling=pb.SamplingParams(n=6)))
    assert sorted(answer.texts) == sorted(answer.finished) == list(range(6))
    assert all(re.fullmatch(EMAIL, text) for text in answer.texts.values())
    assert len(set(answer.texts.values())) > 1


def test_logprobs_are_the_models_own_under_a_constraint(server: System):
    output = pb.OutputOptions(logprobs=2)
    (answer,) = ask(server, request(3, constraint=pb.Constraint(choice=pb.Choice(texts=COLOURS)), output=output))
    rows = [row for delta in answer.deltas for row in delta.logprobs]
    assert len(rows) == len(answer.token_ids[0])
    assert any(row.rank > 2 for row in rows), "the mask takes the likeliest tokens away, and their probabilities stay"
    assert all(len(row.top) == 2 and row.top[0].logprob >= row.logprob for row in rows)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_complete_text_ends_though_the_models_own_end_is_ignored(server: System):
    stop = pb.StopConditions(ignore_eos=True)
    for answer in ask(server, *(request(seed, constraint=pb.Constraint(regex=EMAIL), stop=stop) for seed in SEEDS)):
        assert re.fullmatch(EMAIL, answer.text)
        assert answer.reason == ENDED
        assert not answer.finished[0].HasField("stop_token_id")


def test_a_complete_text_ends_with_an_end_of_sequence_token(server: System):
    model = server.stub.GetModel(pb.GetModelRequest())
    (answer,) = ask(server, request(1, constraint=pb.Constraint(choice=pb.Choice(texts=["red"]))))
    assert answer.text == "red"
    assert answer.finished[0].stop_token_id in model.eos_token_ids
    assert answer.token_ids[0][-1] == answer.finished[0].stop_token_id


def test_stop_strings_and_minima_hold_within_a_constraint(server: System):
    constraint = pb.Constraint(regex="[a-z]{40}")
    stop = pb.StopConditions(stop_strings=["e", "a", "t"])
    for answer in ask(server, *(request(seed, constraint=constraint, stop=stop) for seed in SEEDS)):
        assert not set(answer.text) & set("eat")
        assert len(answer.text) == 40 or answer.finished[0].stop_string in stop.stop_strings
    stop = pb.StopConditions(min_tokens=20, max_tokens=30)
    for answer in ask(server, *(request(seed, constraint=pb.Constraint(regex="[a-z]*"), stop=stop) for seed in SEEDS)):
        assert 20 <= len(answer.token_ids[0]) <= 30


# --- refusals --------------------------------------------------------------------------------------------------------


def hostile_schema() -> str:
    return json.dumps({"allOf": [{"pattern": f"[ab]{{{count}}}c"} for count in range(2, 60)]})


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        (pb.Constraint(regex="(a"), "constraint.regex"),
        (pb.Constraint(regex="a(?=b)"), "constraint.regex"),
        (pb.Constraint(regex=r"[^\s\S]"), "constraint.regex"),
        (pb.Constraint(regex="a" * 70_000), "constraint.regex"),
        (pb.Constraint(json_schema="{"), "constraint.json_schema"),
        (pb.Constraint(json_schema='{"type": "colour"}'), "constraint.json_schema"),
        (pb.Constraint(json_schema='{"$ref": "#"}'), "constraint.json_schema"),
        (pb.Constraint(json_schema=hostile_schema()), "constraint.json_schema"),
        (pb.Constraint(grammar="start: x"), "constraint.grammar"),
        (pb.Constraint(grammar="start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "constraint.grammar"),
        (pb.Constraint(choice=pb.Choice(texts=["a", ""])), "constraint.choice.texts"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_constraint_that_cannot_be_met_is_refused_by_its_field(server: System, constraint: pb.Constraint, field: str):
    refusal = server.refusal(request(1, constraint=constraint))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert refusal.reason == "InvalidRequest"


def test_hostile_constraints_hold_up_nobody(server: System):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        hostile = [
            pool.submit(server.refusal, request(seed, constraint=pb.Constraint(json_schema=hostile_schema())))
            for seed in range(4)
        ]
        answers = ask(server, *(request(seed, max_tokens=100, constraint=pb.Constraint(regex=EMAIL)) for seed in SEEDS))
        assert all(re.fullmatch(EMAIL, answer.text) for answer in answers)
        assert {one.result().code for one in hostile} == {grpc.StatusCode.INVALID_ARGUMENT}


def test_cancellation_and_deadlines_hold_while_a_grammar_compiles(server: System):
    hostile = request(1, constraint=pb.Constraint(json_schema=hostile_schema()))
    server.stub.Generate(hostile).cancel()
    assert refusal_of(server.stub.Generate(hostile, timeout=0.3)).code == grpc.StatusCode.DEADLINE_EXCEEDED
