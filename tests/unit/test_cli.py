import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import duet
from duet.cli import serve
from duet.cli.main import main
from duet.cli.serve import client_address
from duet.launch import SCHEDULER_FLAGS, split_flags, to_flags
from scheduler_service.config import SchedulerConfig
from tests.unit import fake_inference as fake
from tests.unit.fake_inference import ServerThread, expected_tokens

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "clients/python")])


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread() as running:
        yield running


def eventually(condition: Callable[[], object]) -> None:
    """Wait for something that happens in another process; the test's timeout is the limit."""
    while not condition():
        time.sleep(0.02)


def duet_command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "duet", *argv]


# --- generate -----------------------------------------------------------------------------------------------------


def test_generate_prints_the_continuation(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "ab", "--address", server.address, "--max-tokens", "3", "--seed", "4"]) == 0
    assert capsys.readouterr().out == "<195><196><197>\n"
    (request,) = server.service.requests
    assert (request.text, request.sampling.seed, request.sampling.temperature) == ("ab", 4, pytest.approx(0.2))


def test_generate_reads_standard_input_and_prints_json(
    server: ServerThread, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("häh")
    with open(tmp_path / "prompt") as prompt:
        monkeypatch.setattr(sys, "stdin", prompt)
        assert main(["generate", "--json", "--address", server.address, "--chat"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["token_ids"] == expected_tokens(list("häh".encode()), 64)
    assert output["finish_reason"] == "length"
    assert server.service.requests[0].chat.messages[0].content == "häh"


def test_an_unreachable_server_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", "x"], ["chat"], ["status"], ["status", "--json"], ["bench"]):
        assert main([*command, "--address", "127.0.0.1:1"]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert re.fullmatch(r"duet: no connection to 127\.0\.0\.1:1: [^\n]*\n", printed.err)


def test_a_refused_request_is_one_line_and_status_1(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--max-tokens=-1", "--address", server.address]) == 1
    assert re.fullmatch(r"duet: stop\.max_tokens: [^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["generate", "x", "--nonsense"], ["generate", "x", "--seed", "y"], ["bench", "--streams", "0"]],
)
def test_wrong_usage_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_an_interrupted_command_is_status_130(server: ServerThread) -> None:
    server.service.script = fake.never_end
    command = duet_command("generate", "x", "--address", server.address)
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": PATHS}, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.read(3) == b"<7>"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert server.service.cut_calls.acquire(timeout=30)


def test_a_reader_that_leaves_is_no_traceback(server: ServerThread) -> None:
    server.service.script = fake.never_end
    command = duet_command("generate", "x", "--address", server.address)
    env, pipe = os.environ | {"PYTHONPATH": PATHS}, subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(3)
        process.stdout.close()
        assert process.wait() == 1
        assert process.stderr.read() == b""


# --- chat ---------------------------------------------------------------------------------------------------------


class Terminal:
    """A command on a pseudo-terminal of its own, so that Ctrl-C and Ctrl-D are what they are to a person."""

    def __init__(self, *argv: str) -> None:
        spawn = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", spawn, *duet_command(*argv)],
            env=os.environ | {"PYTHONPATH": PATHS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.seen = ""

    def type(self, text: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(text.encode())

    def expect(self, pattern: str) -> None:
        """Read until `pattern` is there, and drop all up to its end."""
        assert self._process.stdout
        while not (match := re.search(pattern, self.seen)):
            heard = self._process.stdout.read(4096)
            assert heard, f"the command ended without {pattern!r}"
            self.seen += heard.decode()
        self.seen = self.seen[match.end() :]

    def wait(self) -> int:
        with self._process:
            return self._process.wait()


def test_chat_keeps_the_conversation(server: ServerThread) -> None:
    command = duet_command("chat", "--system", "be brief", "--max-tokens", "2", "--address", server.address)
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": PATHS}, input="a\n\nb\n", capture_output=True, text=True, check=True
    )
    first = expected_tokens(list(b"be briefa"), 2)
    answer = "".join(f"<{token}>" for token in first)
    assert done.stdout.splitlines()[0] == answer
    conversations = [[(one.role, one.content) for one in r.chat.messages] for r in server.service.requests]
    beginning = [("system", "be brief"), ("user", "a")]
    assert conversations == [beginning, [*beginning, ("assistant", answer), ("user", "b")]]
    assert not server.service.requests[0].stop.ignore_eos


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(server: ServerThread) -> None:
    server.service.script = fake.never_end
    terminal = Terminal("chat", "--max-tokens", "6", "--address", server.address)
    terminal.expect("> ")
    terminal.type("first\n")
    terminal.expect("<7><7>")
    terminal.type("\x03")
    terminal.expect(r"\[stopped\]\s+(\x1b\S+)?> ")
    assert server.service.cut_calls.acquire(timeout=30)
    server.service.script = fake.count_up
    terminal.type("second\n")
    terminal.expect(r"<\d+>")
    terminal.expect("> $")
    terminal.type("\x04")
    assert terminal.wait() == 0
    roles = [message.role for message in server.service.requests[-1].chat.messages]
    assert roles == ["user", "assistant", "user"]


# --- status -------------------------------------------------------------------------------------------------------


def test_status_shows_load_and_rates(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--address", server.address]) == 0
    out = capsys.readouterr().out
    assert "no executor yet" in out.splitlines()[0]
    assert out.count("3 running of 64, 0 waiting") == 2
    assert out.count("10 used, 20 cached, 70 free, of 100 x 64 tokens") == 2
    assert out.count("25.0% of prompt tokens") == 2
    assert re.findall(r"(\d+) prefill, (\d+) decode", out) == [("100", "10"), ("300", "30")]  # since the one before
    assert "\x1b" not in out  # it is no terminal


def test_status_json_is_one_snapshot_of_every_field(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "--address", server.address]) == 0
    snapshot = json.loads(capsys.readouterr().out)
    assert snapshot["server"]["load"]["cached_tokens_total"] == 250
    assert snapshot["server"]["epoch"] == 0
    assert snapshot["model"]["eos_token_ids"] == [2]


# --- serve, and LLM on services of its own --------------------------------------------------------------------------


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for both services, found before the real ones by processes started here; each logs its start."""
    for name in ("scheduler_service", "executor_service"):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "__main__.py").write_text(
            textwrap.dedent(f"""
                import os, sys
                with open({str(tmp_path / "starts")!r}, "a") as starts:
                    print("{name}", os.getpid(), *sys.argv[1:], file=starts, flush=True)
                if "--fail=flag" in sys.argv:
                    print("bad flag", flush=True)
                    sys.exit(2)
                if "--fail=model" in sys.argv:
                    sys.exit("the model is damaged")
                from tests.unit.fake_inference import main
                main()
            """)
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), PATHS]))
    return tmp_path


def starts(services: Path) -> list[list[str]]:
    """[service, process id, argument, ...] of every start."""
    path = services / "starts"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def is_running(pid: str) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_llm_starts_both_services_and_leaves_none_running(services: Path) -> None:
    with duet.LLM("/the/model", num_blocks=512, queue_order="priority", device=None) as llm:
        assert llm.generate(["a"], duet.SamplingParams(max_tokens=2), use_tqdm=False)[0]["token_ids"] == [97, 98]
        flags = {name: argv for name, _, *argv in starts(services)}
        assert flags["executor_service"][:3] == ["--model", "/the/model", "--listen"]
        assert flags["executor_service"][4:] == ["--num-blocks=512"]
        executor = flags["executor_service"][3]
        assert flags["scheduler_service"][4:] == ["--executor", executor, "--queue-order=priority"]
        assert flags["scheduler_service"][3] == llm.address != executor
        pids = [pid for _, pid, *_ in starts(services)]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.parametrize("how", ["end", "exit", "exception", "kill"])
def test_services_of_an_llm_end_with_its_process(services: Path, how: str) -> None:
    last = {"end": "", "exit": "sys.exit(3)", "exception": "1 / 0", "kill": "os.kill(os.getpid(), 9)"}[how]
    script = f"import os, sys, duet; llm = duet.LLM('m'); print('up', flush=True); {last}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "up\n", done.stderr
    assert done.returncode == {"end": 0, "exit": 3, "exception": 1, "kill": -9}[how]
    eventually(lambda: not any(is_running(pid) for _, pid, *_ in starts(services)))


def test_llm_that_cannot_start_shows_the_end_of_the_log(services: Path) -> None:
    with pytest.raises(duet.StartFailed, match="bad flag"):
        duet.LLM("m", fail="flag")
    with pytest.raises(duet.StartFailed, match=r"(?s)the model is damaged.*the model is damaged"):
        duet.LLM("m", fail="model")
    assert not any(is_running(pid) for _, pid, *_ in starts(services))


@contextlib.contextmanager
def start_serve(*argv: str) -> Iterator["subprocess.Popen[str]"]:
    pipe = subprocess.PIPE
    with subprocess.Popen(duet_command("serve", *argv), stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()  # nothing, unless the test failed; the services die with it


def read_until(process: "subprocess.Popen[str]", words: str) -> str:
    assert process.stdout
    for line in process.stdout:
        if words in line:
            return line
    raise AssertionError(f"the process ended without {words!r}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_tells_when_it_is_ready_and_stops_both_services(services: Path, number: signal.Signals) -> None:
    listen = free_address()
    addresses = ["--listen", listen, "--executor-listen", "127.0.0.1:0"]
    with start_serve("the-model", *addresses, "--max-waiting", "9", "--num-blocks", "5") as process:
        assert listen in read_until(process, "Ready")
        assert f"chat --address {listen}" in read_until(process, "chat")
        argv = {name: words for name, _, *words in starts(services)}
        assert argv["scheduler_service"][-2:] == ["--max-waiting", "9"]
        assert argv["executor_service"][-2:] == ["--num-blocks", "5"]
        process.send_signal(number)
        assert process.wait() == 0
    assert not any(is_running(pid) for _, pid, *_ in starts(services))


def test_serve_restarts_a_service_that_dies(services: Path) -> None:
    with start_serve("m", "--listen", free_address(), "--executor-listen", "127.0.0.1:0") as process:
        read_until(process, "Ready")
        (victim,) = [pid for name, pid, *_ in starts(services) if name == "scheduler_service"]
        os.kill(int(victim), signal.SIGKILL)
        eventually(lambda: len(starts(services)) == 3)
        assert starts(services)[-1][0] == "scheduler_service"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0


def test_serve_gives_up_on_services_that_cannot_start(services: Path) -> None:
    with start_serve("m", "--fail=flag") as process:
        assert process.wait() == 1
        assert process.stderr
        assert "giving up" in process.stderr.read()


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return f"127.0.0.1:{held.getsockname()[1]}"


def test_flags_find_their_service() -> None:
    own = {"model", "listen", "executor"}  # given by the launcher itself
    assert {
        name.replace("_", "-") for name in SchedulerConfig.__dataclass_fields__ if name not in own
    } == SCHEDULER_FLAGS
    words = ["--num-blocks", "5", "--max-waiting=9", "--queue-order", "fcfs", "--stop", "-1", "2"]
    assert split_flags(words) == (
        ["--max-waiting=9", "--queue-order", "fcfs"],
        ["--num-blocks", "5", "--stop", "-1", "2"],
    )
    assert to_flags({"num_blocks": 5, "dtype": None}) == ["--num-blocks=5"]


def test_serve_recommends_the_duet_that_it_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = tmp_path / "own" / "duet", tmp_path / "other" / "duet"
    for program in (own, other):
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    for path, started_as, expected in (
        (own, own, "duet"),
        (other, own, str(own)),
        (tmp_path / "nowhere" / "duet", own, str(own)),
        (own, tmp_path / "__main__.py", "python -m duet"),
    ):
        monkeypatch.setenv("PATH", str(path.parent))
        monkeypatch.setattr(sys, "argv", [str(started_as), "serve", "m"])
        assert serve._example("127.0.0.1:1") == f"{expected} chat --address 127.0.0.1:1"


def test_a_wildcard_listener_is_reached_on_the_loopback() -> None:
    assert client_address("0.0.0.0:1") == "127.0.0.1:1"
    assert client_address("[::]:1") == "[::1]:1"
    assert client_address("10.0.0.1:1") == "10.0.0.1:1"
