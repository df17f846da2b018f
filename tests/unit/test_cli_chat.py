"""`duet chat`: a conversation on a pipe and at a terminal, and its commands."""

import asyncio
import dataclasses
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details

from duet import SamplingParams
from duet.cli.chat_commands import ChatState, Refused, run_command
from duet.cli.conversation import Conversation
from tests.unit import fake_inference as fake
from tests.unit.cli_harness import Terminal, at_once, duet, duet_command
from tests.unit.fake_inference import FakeInference, ServerThread, expected_tokens


def conversations(service: FakeInference) -> list[list[tuple[str, str]]]:
    """What was sent with each request, as (role, content)."""
    return [[(one.role, one.content) for one in request.chat.messages] for request in service.requests]


def answer(prompt: str, count: int) -> str:
    return "".join(f"<{token}>" for token in expected_tokens(list(prompt.encode()), count))


# --- on a pipe ------------------------------------------------------------------------------------------------------


def test_chat_keeps_the_conversation_and_prints_answers_alone(server: ServerThread) -> None:
    flags = ["--system", "be brief", "--max-tokens", "2", "--temperature", "0", "--address", server.address]
    done = duet("chat", *flags, text="a\n\nb\n")
    first = answer("be briefa", 2)
    second = answer(f"be briefa{first}b", 2)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{first}\n{second}\n", "")
    beginning = [("system", "be brief"), ("user", "a")]
    assert conversations(server.service) == [beginning, [*beginning, ("assistant", first), ("user", "b")]]
    assert not server.service.requests[0].stop.ignore_eos


def test_a_message_goes_on_after_a_backslash_and_may_begin_with_a_slash(server: ServerThread) -> None:
    server.service.script = at_once
    text = "one\\\ntwo\\\nthree\n//etc/hosts\nthe end\\"  # the input ends before the message does
    assert duet("chat", "--max-tokens", "1", "--address", server.address, text=text).returncode == 0
    questions = [messages[-1][1] for messages in conversations(server.service)]
    assert questions == ["one\ntwo\nthree", "/etc/hosts", "the end"]


def test_json_is_an_object_for_each_answer(server: ServerThread) -> None:
    server.service.script = at_once
    done = duet("chat", "--json", "--max-tokens", "2", "--address", server.address, text="a\n/tokens\nb\n")
    outputs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [output["text"] for output in outputs] == [answer("a", 2), answer(f"a{answer('a', 2)}b", 2)]
    assert outputs[0]["finish_reason"] == "length"
    assert done.stderr == "3 of 4096 tokens in the last prompt and its answer, 2 generated in all\n"


def test_commands_work_on_a_pipe(server: ServerThread, tmp_path: Path) -> None:
    server.service.script = at_once
    file = tmp_path / "talk.json"
    lines = [
        *("/set max_tokens 1", "/system be brief", "a", "b", "/undo", "/retry", f"/save {file}"),
        *("/set max-tokens", "/reset", "c", f"/load {file}", "/system", "d", "/exit", "never"),
    ]
    done = duet("chat", "--max-tokens", "2", "--address", server.address, text="\n".join(lines))
    assert done.returncode == 0
    to_a = answer("be briefa", 1)
    to_c = answer("be briefc", 2)
    to_d = answer(f"a{to_a}d", 2)
    to_b = answer(f"be briefa{to_a}b", 1)
    assert done.stdout.splitlines() == [to_a, to_b, to_a, to_c, to_d]
    system, a, b = ("system", "be brief"), [("user", "a"), ("assistant", to_a)], ("user", "b")
    assert conversations(server.service) == [
        [system, a[0]],
        [system, *a, b],
        [system, a[0]],  # b is forgotten, a asked again
        [system, ("user", "c")],
        [*a, ("user", "d")],
    ]
    assert json.loads(file.read_text()) == [{"role": role, "content": text} for role, text in [system, *a]]
    assert done.stderr.splitlines() == [
        *("max_tokens = 1", "system prompt set", "forgotten: b", "3 messages saved"),
        *("max_tokens = 2", "conversation forgotten", "3 messages loaded", "no system prompt"),
    ]


def test_a_question_that_failed_is_told_left_out_and_can_be_asked_again(server: ServerThread) -> None:
    refuse = fake.fail(grpc.StatusCode.INVALID_ARGUMENT, "too long", details.ErrorInfo(reason="INVALID"))
    tries = 0

    async def script(request: fake.pb.GenerateRequest, context: fake.Context) -> AsyncIterator[Any]:
        nonlocal tries
        tries += 1
        async for response in (refuse if tries == 1 else at_once)(request, context):
            yield response

    server.service.script = script
    done = duet("chat", "--max-tokens", "1", "--address", server.address, text="a\nb\n/undo\n/nonsense\n/retry\n")
    assert done.stdout.splitlines() == [answer("b", 1)]
    assert conversations(server.service) == [[("user", "a")], [("user", "b")]]
    first, *others = done.stderr.splitlines()
    assert first == "duet: too long"
    assert others == [
        "forgotten: b",
        "duet: there is no command /nonsense: see /help; a message may begin with two slashes instead of one",
        "duet: there is no question to ask again",
    ]
    assert done.returncode == 1  # as no person was there to see it


def test_a_server_that_is_gone_ends_a_chat_on_a_pipe_with_status_3(server: ServerThread) -> None:
    server.service.script = fake.fail(grpc.StatusCode.UNAVAILABLE, "gone", details.ErrorInfo(reason="NO_EXECUTOR"))
    done = duet("chat", "--address", server.address, text="a\nb\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "duet: gone\n")
    assert {messages[-1] for messages in conversations(server.service)} == {("user", "a")}


# --- at a terminal --------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(server: ServerThread) -> Iterator[Callable[..., Terminal]]:
    """Starts a chat at a terminal with these flags."""
    started: list[Terminal] = []

    def start(*flags: str) -> Terminal:
        started.append(Terminal(*duet_command("chat", "--address", server.address, *flags)))
        return started[-1]

    yield start
    for terminal in started:
        terminal.kill()


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(server: ServerThread, chat: Callable[..., Terminal]) -> None:
    server.service.script = fake.never_end
    person = chat("--max-tokens", "6")
    person.expect(r"fake at 127\.0\.0\.1:\d+\. /help lists commands, Ctrl-D leaves\.")
    person.expect("> ")
    person.type("first\n")
    person.expect("<7><7>")
    person.interrupt()
    person.expect(r"\[stopped\]\r\n")
    person.expect("> ")
    assert server.service.cut_calls.acquire(timeout=30)
    server.service.script = fake.count_up
    person.type("second\n")
    person.expect(r"<\d+>")
    person.expect("> $")
    person.type("\x04")
    assert person.wait() == 0
    roles = [message.role for message in server.service.requests[-1].chat.messages]
    assert roles == ["user", "assistant", "user"]


def test_the_speed_of_each_answer_is_dim(server: ServerThread, chat: Callable[..., Terminal]) -> None:
    async def slowly(request: fake.pb.GenerateRequest, context: fake.Context) -> AsyncIterator[Any]:
        yield fake.started(request)
        for offset in (0, 2, 4):
            await asyncio.sleep(0.25)
            yield fake.delta(offset, [1, 2])
        yield fake.finished(request, 6)

    server.service.script = slowly
    person = chat()
    person.expect("> ")
    person.type("a\n")
    line = person.expect(r"\x1b\[2m6 tokens, [\d.]+ tokens/s, first after \d+\.\d\d s\x1b\[0m")
    assert 2 < float(line.split()[2]) < 12  # four tokens in two pauses
    assert float(line.split()[-2]) >= 0.25
    person.type("/exit\n")
    assert person.wait() == 0


def test_ctrl_c_clears_what_was_typed_and_lines_go_on(server: ServerThread, chat: Callable[..., Terminal]) -> None:
    server.service.script = at_once
    person = chat("--max-tokens", "1")
    person.expect("> ")
    person.type("dropped\\\n")
    person.expect(r"\.\.\. ")
    person.type("too")
    person.expect("too")
    person.interrupt()
    person.expect("> ")
    person.type("one\\\n")
    person.expect(r"\.\.\. ")
    person.type("two\n")
    person.expect("<")
    person.type("/exit\n")
    assert person.wait() == 0
    assert conversations(server.service) == [[("user", "one\ntwo")]]


def test_a_chat_at_a_terminal_outlives_its_server(server: ServerThread, chat: Callable[..., Terminal]) -> None:
    server.service.script = fake.fail(grpc.StatusCode.UNAVAILABLE, "gone", details.ErrorInfo(reason="NO_EXECUTOR"))
    person = chat("--max-tokens", "1")
    person.expect("> ")
    person.type("a\n")
    person.expect("duet: gone\r\n")
    server.service.script = at_once
    person.type("/retry\n")
    person.expect("<97>")
    person.type("/exit\n")
    assert person.wait() == 0


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def state() -> ChatState:
    params = SamplingParams(temperature=0.5, max_tokens=None)
    return ChatState(Conversation(None), params, params, max_model_len=100)


def test_help_names_every_command(state: ChatState) -> None:
    names = [line.split()[0] for line in run_command(state, "/help").text.splitlines()]
    commands = ["help", "system", "reset", "undo", "retry", "save", "load", "set", "params", "tokens", "exit"]
    assert names[:-1] == [f"/{name}" for name in commands]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.25", "temperature", 0.25),
        ("/set top-k   7", "top_k", 7),
        ("/set seed none", "seed", None),
        ("/set seed null", "seed", None),
        ("/set ignore_eos true", "ignore_eos", True),
        ("/set stop the end", "stop", "the end"),
        ('/set stop ["a", "b"]', "stop", ["a", "b"]),
        ('/set logit_bias {"5": 1.5}', "logit_bias", {5: 1.5}),
        ("/set temperature", "temperature", 0.5),
    ],
)
def test_set_changes_one_parameter(state: ChatState, line: str, name: str, value: object) -> None:
    state.params = dataclasses.replace(state.params, temperature=0.75)
    before = state.params
    run_command(state, line)
    assert state.params == dataclasses.replace(before, **{name: value})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/set", "usage: /set NAME [VALUE]"),
        ("/set colour red", "there is no field 'colour'"),
        ("/set top_k x", "sampling.top_k"),
        ("/set n 2", "a chat has no use for n"),
        ("/save", "usage: /save FILE"),
        ("/load /nowhere/file", "No such file"),
        ("/load {empty}", "Expecting value"),
        ("/load {other}", "holds no list of messages"),
        ("/undo", "there is no question to forget"),
        ("/retry", "there is no question to ask again"),
        ("/reset all", "/reset takes no argument"),
        ("/Help", "there is no command /Help"),
    ],
)
def test_a_command_that_cannot_be_followed_says_why_and_changes_nothing(
    state: ChatState, tmp_path: Path, line: str, reason: str
) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "other").write_text('[{"role": "tool", "content": "a"}]')
    before = dataclasses.replace(state, conversation=Conversation(None))
    with pytest.raises(Refused, match=reason.replace("[", r"\[")):
        run_command(state, line.format(empty=tmp_path / "empty", other=tmp_path / "other"))
    assert state.conversation.messages == before.conversation.messages == []
    assert state.params == before.params


def test_params_lists_what_set_changes(state: ChatState) -> None:
    run_command(state, "/set min_p 0.125")
    lines = run_command(state, "/params").text.splitlines()
    assert "min_p = 0.125" in lines
    assert "max_tokens = null" in lines
    unused = {"n", "logprobs", "prompt_logprobs"}
    assert {line.split()[0] for line in lines} == {field.name for field in dataclasses.fields(SamplingParams)} - unused


def test_a_saved_conversation_is_a_prompt_and_comes_back_whole(state: ChatState, tmp_path: Path) -> None:
    state.conversation.set_system("s")
    state.conversation.add("ä", "b")
    run_command(state, f"/save {tmp_path / 'my talk.json'}")
    messages = state.conversation.messages
    state.conversation = Conversation("other")
    run_command(state, f"/load {tmp_path / 'my talk.json'}")
    assert state.conversation.messages == messages
    assert "ä" in (tmp_path / "my talk.json").read_text(encoding="utf-8")
    assert os.listdir(tmp_path) == ["my talk.json"]
