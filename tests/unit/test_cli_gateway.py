"""`duet gateway`: which processes it would start."""

import http.server
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from duet import gateway_process
from duet.cli import gateway
from duet.cli.main import main
from servicekit.child_process import Child


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, list[str]]]:
    """Runs the command, and returns the arguments of each process that it would have started."""
    started: list[Child] = []

    class FakeSupervisor:
        def __init__(self, children: list[Child], *, on_ready: Callable[[], None], hang_timeout_s: float) -> None:
            started.extend(children)

        def run(self, stop: threading.Event) -> int:
            return 0

    monkeypatch.setattr(gateway, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for function in ("bind_to_parent", "log_to_stderr", "stop_on_signals"):
        monkeypatch.setattr(gateway, function, lambda *_: None)

    def run(*argv: str) -> dict[str, list[str]]:
        started.clear()
        assert main(["gateway", *argv]) == 0
        assert len({child.name for child in started}) == len(started)
        for child in started:  # a scheduler drains, and what its streams need is there meanwhile
            schedulers = [name for name in (other.name for other in started) if name.startswith("scheduler")]
            if child.name == "gateway":
                assert set(schedulers) <= set(child.stops_after)
            elif child.name.startswith("executor"):
                assert child.stops_after == [child.name.replace("executor", "scheduler")]
        return {child.name: list(child.argv[2:]) for child in started}

    return run


def value_of(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def worker_urls(argv: list[str]) -> list[str]:
    return [word for word in argv if word.startswith("grpc://")]


def test_one_server_and_the_gateway_are_started(children: Callable[..., dict[str, list[str]]]) -> None:
    started = children("model", "--listen", "127.0.0.1:7001", "--executor-listen", "127.0.0.1:7002")
    assert sorted(started) == ["executor 1", "gateway", "scheduler 1"]
    assert worker_urls(started["gateway"]) == ["grpc://127.0.0.1:7001"]
    assert "--num-threads" not in started["executor 1"]


def test_replicas_have_consecutive_ports_and_share_the_cores(children: Callable[..., dict[str, list[str]]]) -> None:
    started = children("model", "--replicas", "3", "--listen", "0.0.0.0:7001", "--executor-listen", "127.0.0.1:7002")
    assert len(started) == 7
    for index in range(3):
        scheduler, executor = started[f"scheduler {index + 1}"], started[f"executor {index + 1}"]
        assert value_of(scheduler, "--listen") == f"0.0.0.0:{7001 + 2 * index}"
        assert value_of(scheduler, "--executor") == value_of(executor, "--listen") == f"127.0.0.1:{7002 + 2 * index}"
        assert int(value_of(executor, "--num-threads")) == max(1, len(os.sched_getaffinity(0)) // 3)
    assert worker_urls(started["gateway"]) == [f"grpc://127.0.0.1:{port}" for port in (7001, 7003, 7005)]


def test_flags_of_the_services_are_passed_on(children: Callable[..., dict[str, list[str]]]) -> None:
    started = children("model", "--replicas", "2", "--num-threads=5", "--max-waiting", "9", "--dtype", "float32")
    for number in (1, 2):
        assert value_of(started[f"scheduler {number}"], "--max-waiting") == "9"
        assert value_of(started[f"executor {number}"], "--dtype") == "float32"
        assert [word for word in started[f"executor {number}"] if "num-threads" in word] == ["--num-threads=5"]


def test_the_gateway_alone_is_started_before_running_servers(children: Callable[..., dict[str, list[str]]]) -> None:
    started = children("--server", "a:1", "--server", "b:2", "--http", "0.0.0.0:80", "--smg-flags", "--policy 'x y'")
    (argv,) = started.values()
    assert worker_urls(argv) == ["grpc://a:1", "grpc://b:2"]
    assert argv[1:3] == ["127.0.0.1:80", "2"]  # where to look whether it is ready, and for how many servers
    assert (value_of(argv, "--host"), value_of(argv, "--port")) == ("0.0.0.0", "80")
    assert (value_of(argv, "--prometheus-host"), value_of(argv, "--prometheus-port")) == ("0.0.0.0", "81")
    assert argv[-2:] == ["--policy", "x y"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "either a model"),
        (("model", "--server", "a:1"), "either a model"),
        (("--server", "a:1", "--dtype=float32"), "unrecognized arguments: --dtype=float32"),
        (("model", "--replicas", "0"), "at least 1"),
        (("model", "--http", "8000"), "not of the form HOST:PORT"),
        (("--server", "a:b"), "not of the form HOST:PORT"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["gateway", *argv])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_without_smg_the_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["gateway", "--server", "a:1"]) == 1
    assert "pip install smg" in capsys.readouterr().err


@pytest.fixture
def readiness() -> Iterator[Any]:
    """A gateway that answers /readiness with the status and body that the test sets."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/readiness"
            self.send_response(server.status)
            self.end_headers()
            self.wfile.write(json.dumps(server.body).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_gateway_is_ready_when_it_has_found_every_server(readiness: Any) -> None:
    readiness.status, readiness.body = 503, {"status": "not ready"}
    assert gateway_process._num_healthy_servers(readiness.address) == 0
    readiness.status, readiness.body = 200, {"status": "ready", "healthy_workers": 2}
    assert gateway_process._num_healthy_servers(readiness.address) == 2
    assert gateway_process._num_healthy_servers("127.0.0.1:1") == 0
