"""Every row of the tables of OpenAI's parameters in docs/parameters.md is true of the real gateway and servers."""

import functools
import importlib.metadata
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import openai
import pytest
from openai.types import completion_create_params as completion_types
from openai.types.chat import completion_create_params as chat_types

from protos.duet.inference.v1 import inference_pb2 as pb
from tests.e2e.system import PATIENCE_S, ROOT, generate_request
from tests.gateway.fleet import Fleet, Native, ask, same

PAGE = (ROOT / "docs/parameters.md").read_text()
PROMPT = "the quick fox"
NUM_TOKENS = 32
TOOL: Any = {"type": "function", "function": {"name": "pick", "parameters": {"type": "object", "maxProperties": 0}}}
CALL = r'\{"name":"pick","parameters":\{\}\}'  # as --tool-call-parser=json reads it
DROPPED = "dropped by the gateway"
BY_NAME = {"type": "function", "function": {"name": "pick"}}
INTEGER = {"type": "integer"}


class Row(NamedTuple):
    status: str
    becomes: str
    remarks: str

    @property
    def field(self) -> str | None:
        """Of GenerateRequest, if the parameter becomes exactly that."""
        found = re.fullmatch(r"`([a-z_.]+)`", self.becomes)
        return found and found[1]

    @property
    def refusals(self) -> list[tuple[int, str]]:
        """Status and words, in the order of the row."""
        return [(int(code), words) for code, words in re.findall(r"`HTTP (\d+): ([^`]+)`", self.becomes + self.remarks)]

    @property
    def bounds(self) -> list[int]:
        found = re.search(r"(?:^|; )(?:at least (\d+)|(-?\d+) to (-?\d+))", self.remarks)
        return [int(bound) for bound in found.groups() if bound] if found else []


def table(heading: str, endpoint: str) -> list[tuple[str, Row]]:
    """The rows below a heading, each with its name behind that of the endpoint."""
    section = PAGE.split(f"\n### {heading}\n")[1].split("\n#")[0]
    lines = [line[1:-1].split("|") for line in section.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [(f"{endpoint}.{name}", Row(*columns)) for name, *columns in cells]


LINES = table("Chat completions", "chat") + table("Completions", "completions")
ROWS = dict(LINES)
MAPPED = {row: field for row in ROWS if (field := ROWS[row].field) and "logprobs" not in row}
IGNORED = [row for row in ROWS if ROWS[row].status == DROPPED or "accepted without effect" in str(ROWS[row])]


def word(plain: str) -> str:
    """One that the answer has, though not at its very beginning."""
    return re.findall("[A-Za-z]{2,}", plain[4:])[0]


# Values that tell. A function takes the text of the plain answer.
VALUES: dict[str, Any] = {
    "frequency_penalty": 2, "presence_penalty": 2, "max_tokens": 7, "max_completion_tokens": 7, "n": 3, "seed": 6,
    "temperature": 0, "top_p": 0.1, "stop": word, "prompt": "the lazy dog",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "integer", "schema": INTEGER}},
}  # fmt: skip
OUR_VALUES: dict[str, Any] = {"stop": lambda plain: [word(plain)], "response_format": json.dumps(INTEGER)}
NO_EFFECT: dict[str, Any] = {
    "audio": {"format": "wav", "voice": "alloy"}, "metadata": {"a": "b"}, "modalities": ["text"],
    "moderation": {"model": "omni-moderation-latest"}, "prediction": {"type": "content", "content": "the"},
    "prompt_cache_key": "key", "prompt_cache_options": {"mode": "explicit"}, "prompt_cache_retention": "24h",
    "safety_identifier": "who", "service_tier": "flex", "store": True, "user": "who", "verbosity": "low",
    "web_search_options": {"search_context_size": "high"}, "logprobs": 2, "best_of": 5,
    "logit_bias": {str(token_id): -100 for token_id in range(0, 400, 2)},
}  # fmt: skip


def message(kind: str, **part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": kind, **part}]}]}


STOPS, LATE = {"stop": list("abcde")}, {"stream_options": {"include_usage": True}}
REFUSED: dict[str, list[dict[str, Any]]] = {  # requests that are refused in the words of each row, in its order
    "chat.messages": [
        message("image_url", image_url={"url": "data:image/png;base64,AAAA"}),
        message("input_audio", input_audio={"data": "AAAA", "format": "wav"}),
        message("file", file={"file_data": "AAAA", "filename": "a.pdf"}),
    ],
    "chat.model": [{"model": "other"}],
    "chat.modalities": [{"modalities": ["text", "audio"]}],
    "chat.response_format": [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}}
    ],
    "chat.stop": [STOPS],
    "chat.stream_options": [LATE],
    "chat.tool_choice": [
        {"tool_choice": BY_NAME},
        {"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "pick"}}},
        {"tools": [TOOL], "tool_choice": {
            "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [BY_NAME]}}},
    ],
    "chat.tools": [{"tools": [{"type": "custom", "custom": {"name": "pick"}}]}],
    "chat.top_logprobs": [{"top_logprobs": 2}],
    "chat.top_p": [{"top_p": 0}, {"top_p": 1.5}],
    "completions.model": [{"model": "other"}],
    "completions.prompt": [{"prompt": [5, 6, 7]}],
    "completions.best_of": [{"best_of": 2, "n": 2}, {"best_of": 2, "stream": True}],
    "completions.stop": [STOPS],
    "completions.stream_options": [LATE],
    "completions.top_p": [{"top_p": 0}, {"top_p": 1.5}],
}  # fmt: skip
_shown: set[str] = set()


def shows(*rows: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks the test of rows that need one of their own."""
    _shown.update(rows)
    return lambda test: test


def body(fleet: Fleet, row: str, **fields: Any) -> str:
    """The answer's JSON without what is never twice the same. Sampled, so that each parameter may show."""
    chat = row.startswith("chat.")
    prompt = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    extra = {"ignore_eos": True} | fields.pop("extra_body", {})
    plain = {"model": fleet.model, "temperature": 1, "seed": 5, "max_tokens": NUM_TOKENS, "extra_body": extra}
    resource: Any = fleet.client.chat.completions if chat else fleet.client.completions
    response = resource.with_raw_response.create(**plain | prompt | fields)
    response.http_response.read()  # what is streamed too
    return re.sub(r'"(id|created)":("[^"]*"|\d+),', "", response.text)


def answer(fleet: Fleet, row: str, **fields: Any) -> dict[str, Any]:
    return json.loads(body(fleet, row, **fields))


def texts(response: dict[str, Any]) -> list[str]:
    choices = sorted(response["choices"], key=lambda choice: choice["index"])
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in choices]


def calls(response: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and arguments."""
    called = response["choices"][0]["message"].get("tool_calls") or []
    return [(call["function"]["name"], call["function"]["arguments"]) for call in called]


def native(fleet: Fleet, row: str, path: str, value: Any) -> Native:
    """What our own API answers with the value in that field of its request."""
    request = generate_request(PROMPT, max_tokens=NUM_TOKENS, sampling=pb.SamplingParams(temperature=1, seed=5))
    if row.startswith("chat."):
        request.chat.messages.add(role="user", content=PROMPT)
    *owners, name = path.split(".")
    functools.reduce(getattr, owners, request).ClearField(name)
    fields = functools.reduce(lambda inner, part: {part: inner}, reversed(path.split(".")), value)
    request.MergeFrom(pb.GenerateRequest(**fields))
    return Native(fleet.replicas[0].stub.Generate(request, timeout=PATIENCE_S))


@pytest.fixture(scope="module")
def plain(_fleet: Fleet) -> dict[str, str]:
    """The answers to requests that have no parameter but those of all. Both servers hold the prompt's full block."""
    for replica in _fleet.replicas:
        ask(replica, PROMPT, 1, chat=True)
    return {endpoint: body(_fleet, f"{endpoint}.") for endpoint in ("chat", "completions")}


@pytest.mark.parametrize(
    ("endpoint", "types"),
    [
        ("chat", chat_types.CompletionCreateParamsStreaming),
        ("completions", completion_types.CompletionCreateParamsStreaming),
    ],
)
def test_the_table_has_every_parameter_of_openais_request_once(endpoint: str, types: type):
    assert f"`openai` {importlib.metadata.version('openai')}," in PAGE
    names = [row.split(".")[1] for row, _ in LINES if row.startswith(f"{endpoint}.")]
    assert sorted(names) == sorted(types.__annotations__)


def test_every_row_is_checked_by_a_test_below():
    assert {row.status for row in ROWS.values()} == {"supported", "refused", "not applicable", DROPPED}
    assert sorted([*MAPPED, *IGNORED, *_shown]) == sorted(ROWS)
    assert {row for row in ROWS if ROWS[row].refusals} == {*REFUSED}


@pytest.mark.parametrize("row", MAPPED)
def test_a_supported_parameter_does_what_the_rows_field_does_in_our_own_api(
    fleet: Fleet, plain: dict[str, str], row: str
):
    endpoint, name = row.split(".")
    (unchanged,) = texts(json.loads(plain[endpoint]))
    values = VALUES[name], OUR_VALUES.get(name, VALUES[name])
    theirs, ours = (value(unchanged) if callable(value) else value for value in values)
    answered = texts(answer(fleet, row, **{name: theirs}))
    own = native(fleet, row, MAPPED[row], ours).texts
    assert len(answered) == len(own)
    assert all(same(text, own[index]) for index, text in enumerate(answered))
    assert not same("".join(answered), unchanged)


@pytest.mark.parametrize("row", IGNORED)
def test_what_is_dropped_or_of_no_effect_leaves_the_answer_as_it_is(fleet: Fleet, plain: dict[str, str], row: str):
    endpoint, name = row.split(".")
    assert body(fleet, row, **{name: NO_EFFECT[name]}) == plain[endpoint]


def test_what_is_dropped_has_an_effect_in_our_own_api(fleet: Fleet, plain: dict[str, str]):
    for row in ("chat.logit_bias", "completions.logit_bias"):
        (field,) = re.findall("`([a-z_.]+)`", ROWS[row].remarks)
        value = {int(token_id): bias for token_id, bias in NO_EFFECT["logit_bias"].items()}
        assert not same(native(fleet, row, field, value).text, texts(json.loads(plain[row.split(".")[0]]))[0])
    assert "`output.logprobs`" in ROWS["completions.logprobs"].remarks
    assert len(native(fleet, "completions.logprobs", "output.logprobs", 2).logprobs) == NUM_TOKENS


def test_a_field_that_the_gateway_does_not_know_is_dropped(fleet: Fleet, plain: dict[str, str]):
    for endpoint in plain:
        assert body(fleet, f"{endpoint}.", extra_body={"no_such_field": 1}) == plain[endpoint]


def test_the_gateways_page_names_all_that_is_dropped():
    (paragraph,) = re.findall(r"\*\*The gateway drops.*?\n\n", (ROOT / "docs/gateway.md").read_text(), re.DOTALL)
    for row in ROWS:
        if ROWS[row].status == DROPPED:
            assert f"`{row.split('.')[1]}`" in paragraph


@pytest.mark.parametrize("row", REFUSED)
def test_a_row_quotes_the_status_and_words_of_a_refusal(fleet: Fleet, row: str):
    for fields, (status, words) in zip(REFUSED[row], ROWS[row].refusals, strict=True):
        with pytest.raises(openai.APIStatusError, match=re.escape(words)) as caught:
            body(fleet, row, **fields)
        assert caught.value.status_code == status


@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row].bounds])
def test_a_range_is_accepted_to_its_ends_and_refused_beyond_them(fleet: Fleet, row: str):
    name = row.split(".")[1]
    others: dict[str, Any] = {"logprobs": True} if name == "top_logprobs" else {}
    bounds = ROWS[row].bounds
    for bound in bounds:
        body(fleet, row, **{"max_tokens": 1} | others | {name: bound})
    for beyond in (bounds[0] - 1, *(bound + 1 for bound in bounds[1:])):
        with pytest.raises(openai.BadRequestError, match=name):
            body(fleet, row, **others | {name: beyond})


@shows("chat.model", "completions.model")
def test_the_model_is_the_served_one(fleet: Fleet, plain: dict[str, str]):
    assert {json.loads(text)["model"] for text in plain.values()} == {fleet.model}


@shows("chat.logprobs", "chat.top_logprobs")
def test_log_probabilities_of_a_chat_are_our_own(fleet: Fleet):
    ours = native(fleet, "chat.logprobs", "output.logprobs", 2).logprobs
    for fields in ({}, {"top_logprobs": 2}):
        (choice,) = answer(fleet, "chat.logprobs", logprobs=True, max_tokens=4, **fields)["choices"]
        entries = choice["logprobs"]["content"]
        assert len(entries) in (3, 4)
        for entry, own in zip(entries, ours, strict=False):
            assert entry["logprob"] == pytest.approx(own.logprob)
            tops = [top.logprob for top in own.top] if fields else []
            assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(tops)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_seed_of_more_than_32_bits_becomes_the_nearest_that_has_them(fleet: Fleet, endpoint: str):
    for seed, nearest in ((2**40, 2**31 - 1), (-(2**40), -(2**31))):
        assert body(fleet, f"{endpoint}.seed", seed=seed) == body(fleet, f"{endpoint}.seed", seed=nearest)


def test_without_a_number_of_tokens_there_are_more_than_openais_16(fleet: Fleet):
    for row in ("chat.max_tokens", "completions.max_tokens"):
        unset = answer(fleet, row, max_tokens=openai.omit, extra_body={"regex": "[ab]{40}"})
        assert unset["usage"]["completion_tokens"] > 16


@shows("chat.stream", "chat.stream_options", "completions.stream", "completions.stream_options")
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_stream_has_the_answers_pieces_and_the_usage_where_it_is_asked_for(
    fleet: Fleet, plain: dict[str, str], endpoint: str
):
    def chunks(**fields: Any) -> list[dict[str, Any]]:
        lines = body(fleet, f"{endpoint}.stream", stream=True, **fields).split("\n\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]

    *parts, last = chunks(stream_options={"include_usage": True, "include_obfuscation": True})
    whole = json.loads(plain[endpoint])
    pieces = [part["choices"][0].get("text") or part["choices"][0].get("delta", {}).get("content") for part in parts]
    assert "".join(piece or "" for piece in pieces) == texts(whole)[0]
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert not any("obfuscation" in part or part.get("usage") for part in parts)
    assert not any(part.get("usage") for part in chunks())


@shows("chat.tools", "chat.functions")
@pytest.mark.parametrize("fields", [{"tools": [TOOL]}, {"functions": [TOOL["function"]]}])
def test_tools_are_told_to_the_template_and_a_call_in_the_text_is_read(
    fleet: Fleet, plain: dict[str, str], fields: dict[str, Any]
):
    answered = answer(fleet, "chat.tools", **fields, extra_body={"regex": CALL})
    assert calls(answered) == [("pick", "{}")]
    assert answered["choices"][0]["finish_reason"] == "tool_calls"
    assert answered["usage"]["prompt_tokens"] > json.loads(plain["chat"])["usage"]["prompt_tokens"]


@shows("chat.tool_choice", "chat.function_call")
def test_a_chosen_function_is_called_whatever_the_model_would_write(fleet: Fleet, plain: dict[str, str]):
    for fields in (
        {"tools": [TOOL], "tool_choice": BY_NAME},
        {"functions": [TOOL["function"]], "function_call": {"name": "pick"}},
    ):
        assert calls(answer(fleet, "chat.tool_choice", **fields)) == [("pick", "{}")]
    assert texts(answer(fleet, "chat.tool_choice", tools=[TOOL], tool_choice="required"))[0].startswith("[")
    assert body(fleet, "chat.tool_choice", tools=[TOOL], tool_choice="none") == plain["chat"]
    assert body(fleet, "chat.function_call", functions=[TOOL["function"]], function_call="none") == plain["chat"]


@shows("chat.parallel_tool_calls")
def test_of_calls_that_may_not_be_parallel_the_first_is_handed_on_and_all_are_counted(fleet: Fleet):
    fields: Any = {"tools": [TOOL], "max_tokens": 100, "extra_body": {"regex": rf"\[{CALL},{CALL}\]"}}
    both = answer(fleet, "chat.parallel_tool_calls", **fields)
    first = answer(fleet, "chat.parallel_tool_calls", **fields, parallel_tool_calls=False)
    assert (len(calls(both)), len(calls(first))) == (2, 1)
    assert first["usage"]["completion_tokens"] == both["usage"]["completion_tokens"]


@shows("chat.reasoning_effort")
def test_the_reasoning_effort_is_told_to_the_template(fleet: Fleet, plain: dict[str, str]):
    told = answer(fleet, "chat.reasoning_effort", reasoning_effort="high")["usage"]["prompt_tokens"]
    assert told > json.loads(plain["chat"])["usage"]["prompt_tokens"]


@shows("completions.echo", "completions.suffix")
def test_the_gateway_writes_the_prompt_before_the_text_and_the_suffix_after_it(fleet: Fleet, plain: dict[str, str]):
    (unchanged,) = texts(json.loads(plain["completions"]))
    assert texts(answer(fleet, "completions.echo", echo=True)) == [PROMPT + unchanged]
    assert texts(answer(fleet, "completions.suffix", suffix=" the end")) == [unchanged + " the end"]


def test_several_prompts_have_choices_of_their_own(fleet: Fleet, plain: dict[str, str]):
    both = texts(answer(fleet, "completions.prompt", prompt=[PROMPT, "the lazy dog"]))
    assert both == texts(json.loads(plain["completions"])) + texts(answer(fleet, "completions.", prompt="the lazy dog"))
