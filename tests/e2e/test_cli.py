"""Batches, chats and views of the command line against the real services."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from duet import SamplingParams
from tests.e2e.commands import Terminal, duet, running
from tests.e2e.system import System, wait_until

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
GREEDY_FLAGS = ("--temperature", "0", "--max-tokens", "10", "--ignore-eos")
OF_THE_RUN = {"request_id", "seed", "cached_tokens", "queue_time_s", "time_to_first_token_s"}


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def records(file: Path) -> list[dict[str, Any]]:
    """What was written, without what differs from run to run."""
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in OF_THE_RUN} for record in whole]


def test_a_batch_answers_every_kind_of_prompt_in_order(server: System, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "Grüße"}]
    lines = [
        {"id": "text", "prompt": "The quick"},
        {"id": "tokens", "prompt": [5, 6, 7], "max_tokens": 3},
        {"id": "bad", "prompt": "Hi", "top_p": 2},
        {"id": "two", "prompt": question, "n": 2, "temperature": 1, "seed": 3},
    ]
    write_lines(tmp_path / "in", lines)
    files = ("--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"))
    done = duet("generate", *files, *GREEDY_FLAGS, "--address", server.address)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r"duet: line 3: .*top_p must be", done.stderr)
    text, tokens, bad, two = records(tmp_path / "out")
    assert [one["id"] for one in (text, tokens, bad, two)] == ["text", "tokens", "bad", "two"]
    assert text["token_ids"] == server.client.generate("The quick", GREEDY).token_ids
    assert tokens["token_ids"] == server.client.generate([5, 6, 7], GREEDY).token_ids[:3]
    assert (bad["error"]["field"], bad["line"]) == ("sampling.top_p", 3)
    sampled = SamplingParams(temperature=1, seed=3, n=2, max_tokens=10, ignore_eos=True)
    expected = server.client.generate(question, sampled)
    assert [choice["text"] for choice in two["choices"]] == [choice.text for choice in expected.choices]


def test_a_killed_batch_is_resumed_to_the_output_of_an_undisturbed_one(server: System, tmp_path: Path) -> None:
    lines = [
        {"id": number, "prompt": [number % 50 + 3, number // 50 + 3], "max_tokens": number % 9 + 20}
        for number in range(300)
    ]
    source, killed, undisturbed = tmp_path / "in", tmp_path / "killed", tmp_path / "undisturbed"
    write_lines(source, lines)
    flags = ("--input", str(source), *GREEDY_FLAGS, "--concurrency", "16", "--address", server.address)
    with running("generate", *flags, "--output", str(killed)) as batch:
        wait_until(lambda: killed.exists() and killed.read_bytes().count(b"\n") > 50)
        batch.kill()
    assert killed.read_bytes().count(b"\n") < 300
    server.wait_idle()
    done = duet("generate", *flags, "--output", str(killed), "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert duet("generate", *flags, "--output", str(undisturbed)).returncode == 0
    assert records(killed) == records(undisturbed)
    assert [record["output_tokens"] for record in records(killed)] == [line["max_tokens"] for line in lines]


def test_chat_commands_change_what_is_asked(server: System, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    text = f"/system Be brief.\n/set max_tokens 4\nHello\n/retry\n/save {file}\n/tokens\n"
    done = duet("chat", *GREEDY_FLAGS, "--address", server.address, text=text)
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    answer = server.client.generate(history, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert (done.returncode, done.stdout) == (0, f"{answer.text}\n{answer.text}\n")
    assert json.loads(file.read_text()) == [*history, {"role": "assistant", "content": answer.text}]
    assert f"{answer.prompt_tokens + 4} of 8192 tokens" in done.stderr


def test_model_is_described(server: System) -> None:
    done = duet("model", "--json", "--address", server.address)
    model = server.client.model()
    described = json.loads(done.stdout)
    assert (done.returncode, described["name"], described["weights_digest"]) == (0, "tiny", model.weights_digest)
    assert re.search(
        r"^architecture +LlamaForCausalLM$", duet("model", "--address", server.address).stdout, re.MULTILINE
    )


def test_the_view_of_status_follows_the_load(server: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    try:
        flags = ("--interval", "0.05", "--address", server.address)
        with running("status", *flags, terminal=terminal.device) as status:
            terminal.read_until("0 running of 16")
            with server.endless():
                terminal.read_until("1 running of 16")
                assert "epoch 1" in terminal.read_until("tokens/s")
            status.send_signal(signal.SIGINT)
            assert status.wait() == 130
    finally:
        terminal.close()


def test_status_goes_on_through_a_restart_of_the_core(mortal_server: System) -> None:
    server = mortal_server
    server.probe()
    with running("status", "--json", "--watch", "--interval", "0.1", "--address", server.address) as status:
        assert status.stdout is not None
        lines = iter(status.stdout.readline, b"")
        last = json.loads(next(lines))["server"]["load"]["uptime_seconds"]
        os.kill(server.pids()["scheduler_service.core"], signal.SIGKILL)
        for line in lines:
            uptime = json.loads(line)["server"]["load"]["uptime_seconds"]
            if uptime < last:
                break
            last = uptime
        snapshot = next(json.loads(line) for line in lines if json.loads(line)["server"]["ready"])
        assert snapshot["model"]["name"] == "tiny"
        status.send_signal(signal.SIGINT)
        assert status.wait() == 130
    wait_until(lambda: server.client.server().ready)


def test_a_completion_script_needs_no_server() -> None:
    done = duet("completion", "bash")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip().endswith(" duet")
