"""How `duet serve` and LLM supervise the two services, with stand-ins for them."""

import contextlib
import os
import signal
import socket
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import duet
from duet.launch import hang_timeout_s, split_flags
from executor_service.config import ExecutorConfig
from scheduler_service.config import SchedulerConfig
from tests.unit.cli_harness import PATHS, duet_command

# Ends on SIGTERM, with --drain-s so much later, and on SIGINT; all that happens is in the file `log`.
SERVICE = """
import os, signal, sys, time
def tell(*words):
    with open({log!r}, "a") as log:
        print({name!r}, *words, file=log, flush=True)
def end(number, _):
    tell("got", number)
    drains = [word.partition("=")[2] for word in sys.argv if word.startswith("--drain-s=")]
    if number == signal.SIGTERM and drains:
        time.sleep(int(drains[0]))
    tell("ended")
    os._exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
tell("started", os.getpid())
from tests.unit.fake_inference import main
main()
"""


class Services:
    def __init__(self, directory: Path) -> None:
        self._log = directory / "log"

    @property
    def log(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def pids(self, name: str) -> list[int]:
        """Of every start."""
        return [int(line.split()[2]) for line in self.log if line.startswith(f"{name} started")]

    @property
    def ends(self) -> list[str]:
        return [line for line in self.log if " started" not in line]


@pytest.fixture
def services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Services:
    """Found before the real ones by processes started here."""
    for name in ("scheduler", "executor"):
        package = tmp_path / f"{name}_service"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(textwrap.dedent(SERVICE.format(name=name, log=str(tmp_path / "log"))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), PATHS]))
    return Services(tmp_path)


@contextlib.contextmanager
def serving(*flags: str) -> Iterator["subprocess.Popen[str]"]:
    """`duet serve`, ready."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        listen = f"127.0.0.1:{held.getsockname()[1]}"
    command = duet_command("serve", "m", "--listen", listen, "--executor-listen", "127.0.0.1:0", *flags)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert any("Ready" in line for line in process.stdout)
            yield process
        finally:
            process.kill()


def eventually(condition: Callable[[], object]) -> None:
    """Wait for something that happens in another process; the test's timeout is the limit."""
    while not condition():
        time.sleep(0.02)


def test_serve_keeps_the_executor_until_the_scheduler_has_drained(services: Services) -> None:
    with serving("--drain-s=1") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert services.ends == ["scheduler got 15", "scheduler ended", "executor got 15", "executor ended"]


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_serve_interrupts_the_scheduler_on_ctrl_c_and_on_a_second_signal(
    services: Services, numbers: list[signal.Signals]
) -> None:
    with serving("--drain-s=600") as process:
        process.send_signal(numbers[0])
        if len(numbers) > 1:
            eventually(lambda: "scheduler got 15" in services.log)
            process.send_signal(numbers[1])
        assert process.wait() == 0
    assert "scheduler got 2" in services.log


def test_an_llm_interrupts_the_scheduler_when_it_is_closed(services: Services) -> None:
    with duet.LLM("m", drain_s=600):
        pass
    assert "scheduler got 2" in services.log
    assert "scheduler got 15" not in services.log


@pytest.mark.parametrize("name", ["scheduler", "executor"])
def test_a_service_that_is_stopped_is_started_again(services: Services, name: str) -> None:
    with duet.LLM("m", hang_timeout_s=1) as llm:
        os.kill(services.pids(name)[0], signal.SIGSTOP)
        eventually(lambda: len(services.pids(name)) == 2)
        retry = duet.Retry(max_attempts=100, max_delay_s=0.2)
        with duet.Client(llm.address, retry=retry) as client:
            assert client.generate("a", duet.SamplingParams(max_tokens=2)).token_ids == [97, 98]


def test_a_flag_of_both_services_is_given_to_both() -> None:
    words = ["--num-blocks", "5", "--hang-timeout-s", "2", "--drain-s=9", "--hang-timeout-s=3", "--dtype", "float32"]
    assert split_flags(words) == (
        ["--hang-timeout-s", "2", "--drain-s=9", "--hang-timeout-s=3"],
        ["--num-blocks", "5", "--hang-timeout-s", "2", "--hang-timeout-s=3", "--dtype", "float32"],
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], 10.0),
        (["--hang-timeout-s=2.5", "--dtype", "float32"], 2.5),
        (["--hang-timeout-s", "2", "--hang-timeout-s", "3"], 3.0),
        (["--hang-timeout", "2"], 10.0),  # no flag of the services
        (["--hang-timeout-s=soon"], 10.0),
        (["--hang-timeout-s=-1"], 10.0),
        (["--hang-timeout-s=nan"], 10.0),
        (["--hang-timeout-s"], 10.0),
    ],
)
def test_a_launcher_finds_the_hang_timeout_among_the_flags(flags: list[str], expected: float) -> None:
    assert hang_timeout_s(flags) == expected


def test_the_launcher_and_the_services_have_one_default() -> None:
    defaults = {config.__dataclass_fields__["hang_timeout_s"].default for config in (SchedulerConfig, ExecutorConfig)}
    assert defaults == {hang_timeout_s([])}
