"""`duet generate` on prompts from arguments and standard input: what it asks for, and what it prints."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from duet import SamplingParams, StructuredOutputsParams
from duet.cli.main import main
from duet.request import build_request
from tests.unit.cli_harness import at_once
from tests.unit.fake_inference import ServerThread, expected_tokens

FIRST_PARAMS = SamplingParams(temperature=0.2)
SCHEMA = '{"type": "object"}'

# For each field: flags, the same as JSON, the same in Python.
FIELDS: dict[str, tuple[list[str], Any, Any]] = {
    "temperature": (["--temperature", "0.5"], 0.5, 0.5),
    "top_k": (["--top-k", "3"], 3, 3),
    "top_p": (["--top-p", "0.5"], 0.5, 0.5),
    "min_p": (["--min-p", "0.25"], 0.25, 0.25),
    "seed": (["--seed", "4"], 4, 4),
    "max_tokens": (["--max-tokens", "none"], None, None),
    "ignore_eos": (["--ignore-eos"], True, True),
    "stop_token_ids": (["--stop-token-ids", "5,6", "--stop-token-ids", "7"], [5, 6, 7], (5, 6, 7)),
    "n": (["--n", "2"], 2, 2),
    "repetition_penalty": (["--repetition-penalty", "1.5"], 1.5, 1.5),
    "frequency_penalty": (["--frequency-penalty", "0.5"], 0.5, 0.5),
    "presence_penalty": (["--presence-penalty", "-0.5"], -0.5, -0.5),
    "logit_bias": (
        ["--logit-bias", "5=1.5,6=-2", "--logit-bias", "7=1"],
        {"5": 1.5, "6": -2, "7": 1},
        {5: 1.5, 6: -2, 7: 1},
    ),
    "allowed_token_ids": (["--allowed-token-ids", "5,6"], [5, 6], [5, 6]),
    "banned_token_ids": (["--banned-token-ids", "5"], [5], [5]),
    "min_tokens": (["--min-tokens", "2"], 2, 2),
    "stop": (["--stop", "a,b", "--stop", "c"], ["a,b", "c"], ["a,b", "c"]),
    "include_stop_str_in_output": (["--include-stop-str-in-output"], True, True),
    "logprobs": (["--logprobs", "0"], 0, 0),
    "prompt_logprobs": (["--prompt-logprobs", "2"], 2, 2),
    "skip_special_tokens": (["--no-skip-special-tokens"], False, False),
    "truncate_prompt_tokens": (["--truncate-prompt-tokens", "9"], 9, 9),
    "structured_outputs": (["--json-schema", SCHEMA], {"json": SCHEMA}, StructuredOutputsParams(json=SCHEMA)),
}


@pytest.fixture(autouse=True)
def _answer_at_once(server: ServerThread) -> None:
    server.service.script = at_once


def test_every_field_of_sampling_params_is_tried_here() -> None:
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_set_by_a_flag_and_by_a_line_of_json(
    name: str, server: ServerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, as_json, value = FIELDS[name]
    wanted = dataclasses.replace(FIRST_PARAMS, **{name: value})
    assert main(["generate", "ab", "--json", "--address", server.address, *flags]) == 0
    (tmp_path / "in").write_text(json.dumps({"prompt": "ab", name: as_json}))
    assert main(["generate", "--input", str(tmp_path / "in"), "--address", server.address]) == 0
    assert server.service.requests == [build_request("ab", wanted, {})] * 2
    assert server.service.requests[0] != build_request("ab", FIRST_PARAMS, {})


def test_constraints_are_read_from_flags_and_files(server: ServerThread, tmp_path: Path) -> None:
    (tmp_path / "text").write_text('start: "ä"')
    for flags, wanted in (
        (["--json-object"], StructuredOutputsParams(json_object=True)),
        (["--regex", "@a"], StructuredOutputsParams(regex="@a")),
        (["--choice", "a", "--choice", "b"], StructuredOutputsParams(choice=["a", "b"])),
        (["--grammar", 'start: "a"'], StructuredOutputsParams(grammar='start: "a"')),
        (["--grammar", f"@{tmp_path / 'text'}"], StructuredOutputsParams(grammar='start: "ä"')),
        (["--json-schema", f"@{tmp_path / 'text'}"], StructuredOutputsParams(json='start: "ä"')),
    ):
        assert main(["generate", "ab", "--address", server.address, *flags]) == 0
        params = dataclasses.replace(FIRST_PARAMS, structured_outputs=wanted)
        assert server.service.requests[-1] == build_request("ab", params, {})


def test_options_of_the_request_are_sent(server: ServerThread) -> None:
    flags = ["--model", "fake", "--priority", "-3", "--cache-salt", "mine", "--echo"]
    assert main(["generate", "ab", "--address", server.address, *flags]) == 0
    wanted = build_request("ab", FIRST_PARAMS, {"model": "fake", "priority": -3, "cache_salt": "mine", "echo": True})
    assert server.service.requests == [wanted]


def test_a_detachable_request_is_asked_for_by_a_flag_or_a_line_of_json(server: ServerThread, tmp_path: Path) -> None:
    assert main(["generate", "ab", "--address", server.address, "--detach-seconds", "2.5"]) == 0
    (tmp_path / "in").write_text(json.dumps({"prompt": "ab", "detach_seconds": 2.5}))
    assert main(["generate", "--input", str(tmp_path / "in"), "--address", server.address]) == 0
    assert [request.detach_seconds for request in server.service.requests] == [2.5, 2.5]
    assert len({request.request_id for request in server.service.requests} - {""}) == 2


def test_one_prompt_is_printed_as_it_is_continued(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "ab", "--address", server.address, "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == "<195><196><197>\n"
    assert main(["generate", "ab", "--address", server.address, "--max-tokens", "1", "--echo"]) == 0
    assert capsys.readouterr().out == "ab<195>\n"


def test_several_prompts_and_choices_are_told_apart(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    one_token = ["--address", server.address, "--max-tokens", "1"]
    assert main(["generate", "a", "b", *one_token]) == 0
    assert capsys.readouterr().out == "==> prompt 1 <==\n<97>\n==> prompt 2 <==\n<98>\n"
    assert main(["generate", "a", "--n", "2", *one_token]) == 0
    assert capsys.readouterr().out == "==> choice 1 <==\n<97>\n==> choice 2 <==\n<1097>\n"
    assert main(["generate", "a", "b", "--n", "2", "--echo", *one_token]) == 0
    titles = [f"==> prompt {prompt}, choice {choice} <==" for prompt in (1, 2) for choice in (1, 2)]
    texts = ["a<97>", "a<1097>", "b<98>", "b<1098>"]
    assert capsys.readouterr().out.splitlines() == [word for pair in zip(titles, texts, strict=True) for word in pair]


def test_standard_input_is_one_prompt(
    server: ServerThread, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("hä\nh")
    with open(tmp_path / "prompt") as prompt:
        monkeypatch.setattr(sys, "stdin", prompt)
        assert main(["generate", "--json", "--address", server.address, "--chat"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["token_ids"] == expected_tokens(list("hä\nh".encode()), 64)
    assert output["finish_reason"] == "length"
    (message,) = server.service.requests[0].chat.messages
    assert (message.role, message.content) == ("user", "hä\nh")


def test_json_has_a_line_for_each_prompt_with_all_choices(
    server: ServerThread, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a", "ä", "--json", "--n", "2", "--max-tokens", "2", "--address", server.address]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["index"], first["text"], second["index"], second["token_ids"]) == (0, "<97><98>", 1, [359, 360])
    assert [choice["token_ids"] for choice in second["choices"]] == [[359, 360], [1359, 1360]]
    assert "input_digest" not in first


def test_output_goes_to_a_file_as_json(
    server: ServerThread, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "out"
    assert main(["generate", "ab", "--output", str(file), "--address", server.address, "--max-tokens", "1"]) == 0
    assert json.loads(file.read_text())["token_ids"] == [195]
    assert capsys.readouterr() == ("", "")


def test_a_refused_prompt_of_several_ends_the_command(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "--json", "--priority=2147483648", "--address", server.address]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("duet: priority: ")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["ab", "--logprobs", "1"], "--logprobs needs --json"),
        (["ab", "--prompt-logprobs", "1"], "--prompt-logprobs needs --json"),
        (["ab", "--input", "x"], "either as arguments or by --input"),
        (["ab", "--resume"], "--resume needs"),
        (["--input", "x", "--resume"], "--resume needs --output FILE"),
        (["--input", "x", "--overwrite", "--output", "-"], "--overwrite needs --output FILE"),
        (["ab", "--json", "--progress"], "--progress needs --input"),
        (["ab", "--concurrency", "3"], "--concurrency needs --json or --input"),
        (["--input", __file__, "--output", __file__, "--overwrite"], "the same file"),
        (["--input", "-", "--output", __file__], "--resume goes on with it"),
        (["--input", "x", "--resume", "--overwrite"], "not allowed with"),
        (["ab", "--concurrency", "0"], "0 is not at least 1"),
        (["ab", "--timeout", "0"], "0 is not above 0"),
        (["ab", "--detach-seconds", "0"], "0 is not above 0"),
        (["ab", "--logit-bias", "5"], "invalid biases value"),
        (["ab", "--grammar", "@/nowhere"], "No such file"),
        (["ab", "--stop-on-error"], "--stop-on-error needs --input"),
    ],
)
def test_flags_that_cannot_be_followed_are_wrong_usage(
    flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", *flags])
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err
