"""`duet status` and `duet model`: one snapshot, lines, and the view on a terminal."""

import io
import itertools
import json
import re
import signal
import subprocess
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details
from rich.console import Console

from duet.cli import status
from duet.cli.main import main
from duet.cli.status_history import NUM_KEPT, History, Rates, Snapshot
from duet.cli.status_view import view
from duet.errors import DuetError, Unavailable
from protos.duet.inference.v1 import inference_pb2 as pb
from tests.unit import fake_inference as fake
from tests.unit.cli_harness import ENV, Terminal, duet, duet_command
from tests.unit.fake_inference import FakeInference, ServerThread

MODEL = pb.GetModelResponse(name="tiny", architecture="LlamaForCausalLM", dtype="float32", max_model_len=4096)


class Watched(FakeInference):
    """Says of each second what `load` has for it; seconds without a server are UNAVAILABLE."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: Iterator[pb.GetServerResponse | None] = (of_second(second) for second in itertools.count(1))

    async def GetServer(self, request: pb.GetServerRequest, context: fake.Context) -> pb.GetServerResponse:
        answer = next(self.answers)
        if answer is None:
            info = details.ErrorInfo(reason="NO_CORE")
            await fake.abort(context, grpc.StatusCode.UNAVAILABLE, "nobody is there", info)
        assert answer
        return answer


def of_second(second: int, epoch: int = 1, device: str = "cpu, 2 threads") -> pb.GetServerResponse:
    return pb.GetServerResponse(
        version="0", ready=True, queue_order="fcfs", load=fake.load(second), epoch=epoch, device=device
    )


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerThread]:
    running = ServerThread()
    running.service = Watched()
    with running:
        yield running


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the person who watches press Ctrl-C after so many updates, and no time pass between them.

    For them alone: supervisors of other tests' servers sleep in threads of this process.
    """

    def set_up(count: int) -> None:
        seconds = iter(range(count - 1))

        def sleep(_: float) -> None:
            if next(seconds, None) is None:
                raise KeyboardInterrupt

        monkeypatch.setattr(status, "time", types.SimpleNamespace(sleep=sleep))

    return set_up


def answer_with(server: ServerThread, *answers: pb.GetServerResponse | None) -> None:
    assert isinstance(server.service, Watched)
    server.service.answers = iter(answers)


# --- lines and JSON -------------------------------------------------------------------------------------------------


def test_lines_show_load_and_the_rates_since_the_update_before(
    watched: ServerThread, stop_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(3)
    assert main(["status", "--address", watched.address]) == 130
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == f"Duet 0 at {watched.address}, cpu, 2 threads, epoch 1, fcfs"
    assert printed.out.count("Duet 0") == 1
    assert printed.out.count("3 running of 64, 0 waiting") == 3
    assert printed.out.count("10 used, 20 cached, 70 free, of 100 x 64 tokens") == 3
    assert printed.out.count("25.0% of prompt tokens") == 3
    assert printed.out.count("0 detached, 0 quarantined") == 3
    assert printed.out.count("0 executors lost, self-checks: 0 passed\n") == 3
    rates = re.findall(r"(\d+) prefill, (\d+) decode", printed.out)
    assert rates == [("100", "10"), ("300", "30"), ("500", "50")]
    assert "\x1b" not in printed.out  # it is no terminal
    assert printed.err == ""


def test_a_lost_server_is_told_once_and_watched_again_when_it_is_back(
    watched: ServerThread, stop_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(5)
    answer_with(watched, of_second(5), None, None, of_second(1, epoch=2, device="cuda"), of_second(2, 2, "cuda"))
    assert main(["status", "--address", watched.address]) == 130
    printed = capsys.readouterr()
    assert printed.err == "duet: nobody is there: trying again\n"
    assert [line for line in printed.out.splitlines() if line.startswith("Duet")] == [
        f"Duet 0 at {watched.address}, cpu, 2 threads, epoch 1, fcfs",
        f"Duet 0 at {watched.address}, cuda, epoch 2, fcfs",
    ]
    assert re.findall(r"(\d+) prefill", printed.out) == ["500", "100", "300"]  # after the restart, since the start


def troubled(*, failures: int) -> pb.GetServerResponse:
    server = of_second(1)
    server.draining = True
    load = pb.Load(
        detached_requests=4,
        quarantined_requests=5,
        idle_checks_total=12,
        idle_check_failures_total=failures,
        executor_losses_total=6,
    )
    server.load.MergeFrom(load)
    return server


def test_lines_show_draining_detached_and_quarantined_requests_losses_and_self_checks(
    watched: ServerThread, stop_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(3)
    answer_with(watched, of_second(1), troubled(failures=0), troubled(failures=3))
    assert main(["status", "--address", watched.address]) == 130
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("Duet")] == [
        f"Duet 0 at {watched.address}, cpu, 2 threads, epoch 1, fcfs",
        f"Duet 0 at {watched.address}, cpu, 2 threads, epoch 1, fcfs, draining",
    ]
    assert printed.count("4 detached, 5 quarantined\n") == 2
    assert "6 executors lost, self-checks: 12 passed\n" in printed
    assert "6 executors lost, self-checks: 12 passed, 3 FAILED: see the server's log\n" in printed


def test_json_is_one_snapshot_of_every_field(watched: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "--address", watched.address]) == 0
    snapshot = json.loads(capsys.readouterr().out)
    assert snapshot["server"].keys() == {field.name for field in pb.GetServerResponse.DESCRIPTOR.fields}
    assert snapshot["server"]["load"].keys() == {field.name for field in pb.Load.DESCRIPTOR.fields}
    assert snapshot["server"]["load"]["cached_tokens_total"] == 250
    assert snapshot["server"]["epoch"] == 1
    assert snapshot["model"]["eos_token_ids"] == [2]


def test_json_watch_is_a_line_at_every_update(
    watched: ServerThread, stop_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(4)
    answer_with(watched, of_second(1), of_second(2), None, of_second(4))
    assert main(["status", "--json", "--watch", "--address", watched.address]) == 130
    printed = capsys.readouterr()
    uptimes = [json.loads(line)["server"]["load"]["uptime_seconds"] for line in printed.out.splitlines()]
    assert uptimes == [1, 2, 4]
    assert printed.err == "duet: nobody is there: trying again\n"


def test_the_interval_is_kept(watched: ServerThread) -> None:
    argv = duet_command("status", "--json", "--watch", "--interval", "0.2", "--address", watched.address)
    with subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        begin_s = time.monotonic()
        for _ in range(3):
            process.stdout.readline()
        assert time.monotonic() - begin_s > 0.5
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130


def test_model_is_described_in_lines_or_json(server: ServerThread, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--address", server.address]) == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["name"], lines["vocab_size"], lines["eos_token_ids"]) == ("fake", "1000", "2")
    assert main(["model", "--json", "--address", server.address]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields.keys() == lines.keys() == {field.name for field in pb.GetModelResponse.DESCRIPTOR.fields}
    assert (fields["max_model_len"], fields["eos_token_ids"]) == (4096, [2])


# --- rates ----------------------------------------------------------------------------------------------------------


def test_the_hit_rate_is_of_the_prompts_in_between() -> None:
    history = History()
    history.add(pb.Load(prompt_tokens_total=1000, cached_tokens_total=0, uptime_seconds=1))
    rates = history.add(pb.Load(prompt_tokens_total=1200, cached_tokens_total=150, uptime_seconds=3, steps_total=8))
    assert (rates.hit_rate, rates.steps) == (0.75, 4)
    rates = history.add(pb.Load(prompt_tokens_total=1200, cached_tokens_total=150, uptime_seconds=4, steps_total=8))
    assert (rates.hit_rate, rates.steps) == (None, 0)


def test_the_course_holds_rates_between_updates_and_no_more_than_are_shown() -> None:
    history = History()
    for second in range(1, 2 * NUM_KEPT):
        history.add(fake.load(second))
    assert [rates.decode_tokens for rates in history.course] == [
        10 * (2 * second - 1) for second in range(NUM_KEPT, 2 * NUM_KEPT)
    ]
    history.add(fake.load(1))  # the core was started anew: nothing lies between
    assert len(history.course) == NUM_KEPT


# --- the view -------------------------------------------------------------------------------------------------------


def draw(snapshot: Snapshot, history: History, lost: DuetError | None = None, *, styles: bool = False) -> str:
    console = Console(file=io.StringIO(), record=True, width=100, force_terminal=True, color_system="standard")
    rates = history.add(snapshot.server.load)
    console.print(view("host:1", snapshot, rates, history, lost))
    return console.export_text(styles=styles)


def row(drawn: str, name: str) -> list[str]:
    """The lines beside `name` and below it, up to the next name."""
    lines = [
        line.strip("│ ") if not line.startswith("│   ") else "  " + line.strip("│ ") for line in drawn.splitlines()
    ]
    start = next(index for index, line in enumerate(lines) if line.startswith(name))
    following = itertools.takewhile(lambda line: line.startswith("  "), lines[start + 1 :])
    return [lines[start].removeprefix(name).strip(), *(line.strip() for line in following)]


def test_the_view_shows_queues_blocks_hits_and_rates() -> None:
    history = History()
    for second in (1, 2, 3):
        history.add(fake.load(second))
    drawn = draw(Snapshot(of_second(4), MODEL), history)
    assert "Duet 0 at host:1" in drawn.splitlines()[0]
    assert row(drawn, "model") == ["tiny, LlamaForCausalLM, float32"]
    assert row(drawn, "executor") == ["cpu, 2 threads", "epoch 1, 0 lost, up 0:00:04, fcfs"]
    bar, *texts = row(drawn, "requests")
    assert texts == ["3 running of 64, 0 waiting", "0 finished, 0 preemptions", "0 detached, 0 quarantined"]
    assert bar == "██" + "░" * 38  # 3 of 64 are 1.9 of 40
    bar, *texts = row(drawn, "KV blocks")
    assert texts == ["10 used, 20 cached, 70 free", "of 100 x 64 tokens"]
    assert bar == "█" * 12 + "░" * 28
    assert row(drawn, "prefix hits") == ["no prompt now, 25.0% of all prompt tokens"]
    assert row(drawn, "decode") == ["▄▆█", "70 tokens/s, 0 steps/s"]  # of 30, 50 and 70
    assert row(drawn, "prefill") == ["▄▆█", "700 tokens/s"]


@pytest.mark.parametrize(
    ("used", "cached", "cells"),
    [(0, 0, (0, 0)), (1, 1, (1, 1)), (1000, 0, (40, 0)), (990, 10, (40, 0)), (500, 500, (20, 20)), (0, 1000, (0, 40))],
)
def test_used_and_cached_blocks_have_colours_of_their_own(used: int, cached: int, cells: tuple[int, int]) -> None:
    server = of_second(1)
    server.load.MergeFrom(pb.Load(used_blocks=used, cached_blocks=cached, total_blocks=1000))
    server.load.used_blocks, server.load.cached_blocks = used, cached
    line = next(line for line in draw(Snapshot(server, MODEL), History(), styles=True).splitlines() if "KV bl" in line)
    runs = {style: len(bar) for style, bar in re.findall(r"\x1b\[(\d+)m(█+)", line)}
    used_style, cached_style = "31" if used > 900 else "32", "34"
    assert (runs.get(used_style, 0), runs.get(cached_style, 0)) == cells


def test_the_view_of_a_lost_server_is_the_last_one_and_says_why() -> None:
    drawn = draw(Snapshot(of_second(1), MODEL), History(), Unavailable("nobody is there"))
    assert "nobody is there: trying again" in drawn
    assert "3 running of 64" in drawn


@pytest.mark.parametrize(
    ("device", "ready", "shown"),
    [("", False, "none yet"), ("cuda", False, "cuda, not connected"), ("cuda", True, "cuda")],
)
def test_the_view_tells_whether_the_executor_is_there(device: str, ready: bool, shown: str) -> None:
    server = of_second(1, device=device)
    server.ready = ready
    drawn = draw(Snapshot(server, MODEL if device else None), History())
    assert row(drawn, "executor")[0] == shown


@pytest.mark.parametrize(
    ("failures", "shown", "style"),
    [(0, "12 passed", None), (3, "12 passed, 3 FAILED: see the server's log", "31")],
)
def test_the_view_shows_a_self_check_that_failed_in_red(failures: int, shown: str, style: str | None) -> None:
    snapshot = Snapshot(troubled(failures=failures), MODEL)
    drawn = draw(snapshot, History())
    assert row(drawn, "self-checks") == [shown]
    assert row(drawn, "executor")[1] == "epoch 1, 6 lost, up 0:00:01, fcfs"
    assert row(drawn, "requests")[-1] == "4 detached, 5 quarantined"
    styled = next(line for line in draw(snapshot, History(), styles=True).splitlines() if "12 passed" in line)
    assert (f"\x1b[{style}m{shown}" in styled) is (style is not None)


def test_the_view_of_a_draining_server_says_so_and_is_yellow() -> None:
    for server, border in ((of_second(1), "32"), (troubled(failures=0), "33")):
        top = draw(Snapshot(server, MODEL), History(), styles=True).splitlines()[0]
        assert top.startswith(f"\x1b[{border}m")
        assert ("host:1, draining" in top) is server.draining


def test_the_view_is_drawn_in_place_on_a_terminal(watched: ServerThread) -> None:
    terminal = Terminal(*duet_command("status", "--interval", "0.05", "--address", watched.address))
    try:
        terminal.expect("KV blocks")
        terminal.expect(r"\x1b\[1A")  # one line up
        terminal.expect(r"(▁|▂|▃|▄|▅|▆|▇)+█")
        terminal.type("\x03")
        assert terminal.wait() == 130
    finally:
        terminal.kill()


def test_rates_without_time_in_between_are_no_division_by_zero() -> None:
    assert Rates.between(pb.Load(), pb.Load()).decode_tokens == 0


def test_a_snapshot_without_a_model_is_null_in_json(watched: ServerThread) -> None:
    class NoModel(Watched):
        async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
            await fake.abort(
                context, grpc.StatusCode.UNAVAILABLE, "no executor", details.ErrorInfo(reason="NO_EXECUTOR")
            )
            raise AssertionError

    running = ServerThread()
    running.service = NoModel()
    with running:
        done = duet("status", "--json", "--address", running.address)
    assert json.loads(done.stdout)["model"] is None
