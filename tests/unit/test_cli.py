import contextlib
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

import grpc
import pytest
from google.rpc import error_details_pb2 as details

import duet
from duet.cli import serve
from duet.cli.exit_status import EXIT_STATUSES
from duet.cli.main import main
from duet.cli.serve import client_address
from duet.launch import SCHEDULER_FLAGS, split_flags, to_flags
from scheduler_service.config import SchedulerConfig
from tests.unit import fake_inference as fake
from tests.unit.cli_harness import ENV, PATHS, ROOT, duet_command
from tests.unit.fake_inference import ServerThread


def eventually(condition: Callable[[], object]) -> None:
    """Wait for something that happens in another process; the test's timeout is the limit."""
    while not condition():
        time.sleep(0.02)


# --- exit status, start-up ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "x"],
        ["generate", "x", "--json"],
        ["generate", "--input", os.devnull],
        ["chat"],
        ["status"],
        ["status", "--json", "--watch"],
        ["model"],
        ["bench"],
    ],
)
def test_an_unreachable_server_is_one_line_and_status_3(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--address", "127.0.0.1:1"]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"duet: no connection to 127\.0\.0\.1:1: [^\n]*\n", printed.err)


def test_a_full_queue_is_status_3(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    delay = details.RetryInfo()
    delay.retry_delay.FromMilliseconds(1)
    info = details.ErrorInfo(reason="QUEUE_FULL")
    server.service.script = fake.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "4096 requests wait", delay, info)
    assert main(["generate", "x", "--address", server.address]) == 3
    assert capsys.readouterr().err == "duet: 4096 requests wait\n"


def test_a_refused_request_is_one_line_and_status_1(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x", "--max-tokens=-1", "--address", server.address]) == 1
    assert re.fullmatch(r"duet: stop\.max_tokens: [^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["generate", "x", "--nonsense"],
        ["generate", "x", "--seed", "y"],
        ["generate", "x", "--json-object", "--regex", "a"],
        ["status", "--interval", "0"],
        ["completion", "csh"],
        ["bench", "--streams", "0"],
    ],
)
def test_wrong_usage_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_an_interrupted_command_is_status_130(server: ServerThread) -> None:
    server.service.script = fake.never_end
    command = duet_command("generate", "x", "--address", server.address)
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.read(3) == b"<7>"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert server.service.cut_calls.acquire(timeout=30)


def test_a_reader_that_leaves_is_no_traceback(server: ServerThread) -> None:
    server.service.script = fake.never_end
    command = duet_command("generate", "x", "--address", server.address)
    env, pipe = ENV, subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(3)
        process.stdout.close()
        assert process.wait() == 1
        assert process.stderr.read() == b""


def test_exit_statuses_are_told_by_help_and_readme(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    told, readme = capsys.readouterr().out, (ROOT / "README.md").read_text()
    for status, meaning in EXIT_STATUSES.items():
        assert re.search(rf"^  {status} +{re.escape(meaning)}$", told, re.MULTILINE)
        assert f"| {status} | {meaning} |" in readme


@pytest.mark.parametrize("argv", [["--help"], ["nonsense"]])
def test_help_does_not_wait_for_the_imports_of_any_command(argv: list[str]) -> None:
    heavy = ("grpc", "google", "rich", "tqdm", "asyncio", "duet.client")
    code = (
        "import sys\nfrom duet.cli.main import main\n"
        f"try: main({argv!r})\nexcept SystemExit: print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_package_gives_every_name_that_it_promises() -> None:
    code = (
        "import duet\nassert duet.errors.DuetError is duet.DuetError\n"
        "print(*[type(getattr(duet, name)).__name__ for name in duet.__all__])\nduet.nonsense"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert len(done.stdout.split()) == len(duet.__all__)
    assert done.stderr.endswith("AttributeError: module 'duet' has no attribute 'nonsense'\n")


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
