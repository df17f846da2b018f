"""The commands that talk with a running server."""

import json
import re
import signal
from pathlib import Path

from duet import SamplingParams
from tests.e2e.commands import Terminal, duet, free_address, running
from tests.e2e.system import System, wait_until

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
GREEDY_FLAGS = ("--temperature", "0", "--max-tokens", "10", "--ignore-eos")


def test_generate_prints_the_continuation(server: System) -> None:
    expected = server.client.generate("The quick", GREEDY)
    done = duet("generate", "The quick", *GREEDY_FLAGS, "--address", server.address)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.text + "\n", "")


def test_generate_reads_a_prompt_from_standard_input_and_prints_json(server: System) -> None:
    expected = server.client.generate([{"role": "user", "content": "Grüße, 世界"}], GREEDY)
    done = duet("generate", "--chat", "--json", *GREEDY_FLAGS, "--address", server.address, text="Grüße, 世界")
    output = json.loads(done.stdout)
    assert (done.returncode, output["token_ids"], output["text"]) == (0, expected.token_ids, expected.text)
    assert (output["finish_reason"], output["prompt_tokens"]) == ("length", expected.prompt_tokens)


def test_failure_is_one_sentence_and_an_exit_status(server: System) -> None:
    nowhere = free_address()
    for args, status, sentence in (
        (("generate", "", "--address", server.address), 1, "the prompt is empty"),
        (("generate", "Hi", "--top-p", "2", "--address", server.address), 1, "top_p must be"),
        (("generate", "Hi", "--address", nowhere), 3, f"no connection to {nowhere}"),
        (("status", "--json", "--address", nowhere), 3, f"no connection to {nowhere}"),
    ):
        done = duet(*args)
        assert (done.returncode, done.stdout) == (status, "")
        assert re.fullmatch(rf"duet: .*{re.escape(sentence)}.*\n", done.stderr), done.stderr


def test_status_prints_a_snapshot_as_json(server: System) -> None:
    done = duet("status", "--json", "--address", server.address)
    report = json.loads(done.stdout)
    assert (done.returncode, report["model"]["name"], report["server"]["ready"]) == (0, "tiny", True)
    load = report["server"]["load"]
    assert (load["running_requests"], load["waiting_requests"], load["used_blocks"]) == (0, 0, 0)


def test_status_shows_the_load_again_and_again(server: System) -> None:
    with running("status", "--interval", "0.05", "--address", server.address) as status, server.endless():
        assert status.stdout is not None
        lines = iter(status.stdout.readline, b"")
        assert b"fcfs" in next(lines)
        assert any(b"1 running of 16, 0 waiting" in line for line in lines)
        assert any(b"tokens/s" in line for line in lines)
        status.send_signal(signal.SIGINT)
        assert status.wait() == 130


def test_bench_measures_and_stores_its_figures(server: System, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    load = ("--streams", "3", "--input-len", "20", "--output-len", "10", "--repeats", "2", "--warm-up", "0")
    before = server.load()
    done = duet("bench", *load, "--json", str(file), "--address", server.address)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert [run["output_tokens"] for run in report["runs"]] == [30, 30]
    assert report["median"]["tokens_per_s"] > 0
    assert (report["model"]["name"], report["scenario"]["streams"]) == ("tiny", 3)
    after = server.load()
    assert after.output_tokens_total - before.output_tokens_total == 60
    assert after.prompt_tokens_total - before.prompt_tokens_total == 120


def test_chat_keeps_the_conversation(server: System) -> None:
    history = [{"role": "system", "content": "Be brief."}]
    answers: list[str] = []
    for question in ("Hello", "And again?"):
        history.append({"role": "user", "content": question})
        answers.append(server.client.generate(history, GREEDY).text)
        history.append({"role": "assistant", "content": answers[-1]})
    flags = ("--system", "Be brief.", *GREEDY_FLAGS, "--address", server.address)
    done = duet("chat", *flags, text="Hello\n\nAnd again?\n")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "".join(f"{answer}\n" for answer in answers))


def test_chat_at_a_terminal_stops_an_answer_at_ctrl_c_and_leaves_at_ctrl_d(server: System) -> None:
    terminal = Terminal()
    device = terminal.device
    try:
        flags = ("--temperature", "0", "--max-tokens", "7000", "--ignore-eos", "--address", server.address)
        with running("chat", *flags, terminal=device) as chat:
            terminal.read_until("Ctrl-D leaves.\n> ")
            terminal.type("Hello\n")
            wait_until(lambda: server.load().running_requests == 1)
            chat.send_signal(signal.SIGINT)
            assert " [stopped]\n" in terminal.read_until("\x1b[0m\n> ")  # how fast it was stands between
            server.wait_idle()
            terminal.type("\x04")
            assert chat.wait() == 0
    finally:
        terminal.close()
