import importlib.util
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from duet.bench import plot
from duet.bench.limit import Limit
from duet.bench.metrics import Arrivals
from duet.cli.main import main
from tests.unit import fake_inference as fake
from tests.unit.fake_inference import ServerThread

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
CEILINGS = {"device": "some device", "read_bytes_per_s": 1e9, "flops_per_s": 1e12, "copy_bytes_per_s": 1e9}


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread() as running:
        yield running


def prompts(server: ServerThread) -> list[tuple[int, ...]]:
    return [tuple(request.token_ids.ids) for request in server.service.requests]


def test_bench_sends_every_prompt_once_and_stores_the_figures(
    server: ServerThread, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "ceilings.json").write_text(json.dumps(CEILINGS))
    sizes = ["--streams", "5", "--input-len", "7", "--output-len", "4", "--repeats", "2", "--processes", "2"]
    limit = ["--limit", str(tmp_path / "ceilings.json"), "--model-dir", str(tmp_path)]
    out = tmp_path / "out.json"
    assert main(["bench", *sizes, *limit, "--address", server.address, "--json", str(out), "--seed", "6"]) == 0
    assert len(set(prompts(server))) == 3 * 5  # the warm-up's too
    assert {len(prompt) for prompt in prompts(server)} == {7}
    assert all(request.stop.ignore_eos and request.stop.max_tokens == 4 for request in server.service.requests)
    report = json.loads(out.read_text())
    assert set(report) == {
        "scenario", "runs", "median", "limit", "reached", "tokens_counted_by", "model", "server"
    }  # fmt: skip
    scenario = {"name": "fixed", "streams": 5, "input_len": [7, 7], "output_len": [4, 4], "temperature": 0, "seed": 6}
    assert scenario.items() <= report["scenario"].items()
    assert [run["output_tokens"] for run in report["runs"]] == [20, 20]
    assert report["median"]["prompt_tokens"] == 35
    assert report["reached"]["tokens_per_s"] == report["median"]["tokens_per_s"] / report["limit"]["tokens_per_s"]
    assert (report["model"]["name"], report["tokens_counted_by"]) == ("fake", ["token ids"])
    _, head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "1", "run", "2", "median", "limit", "reached"]
    assert re.fullmatch(r"output tok/s( +\d+\.\d){4} +\d+\.\d%", rows[0])


def test_same_seed_gives_the_same_prompts_and_none_new_ones(server: ServerThread) -> None:
    for seed in (["--seed", "5"], ["--seed", "5"], [], []):
        once = ["--repeats", "1", "--warm-up", "0", "--output-len", "1"]
        assert main(["bench", *seed, *once, "--address", server.address]) == 0
    first, second, third, fourth = prompts(server)
    assert first == second
    assert len({first, third, fourth}) == 3


def test_requests_come_at_the_rate_asked_for(server: ServerThread, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    load = ["--scenario", "poisson", "--requests", "8", "--rate", "40", "--input-len", "4", "--output-len", "1"]
    assert main(["bench", *load, "--repeats", "1", "--address", server.address, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["scenario"]["rate"] == 40
    assert server.service.most_running < 8
    assert report["median"]["elapsed_s"] > 0.05


def test_what_a_client_process_meets_is_one_line_and_status_1(
    server: ServerThread, capsys: pytest.CaptureFixture[str]
) -> None:
    server.service.script = fake.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    assert main(["bench", "--address", server.address]) == 1
    assert capsys.readouterr().err == "duet: the queue is full\n"


def test_a_run_with_too_few_tokens_or_cached_ones_is_told(
    server: ServerThread, capsys: pytest.CaptureFixture[str]
) -> None:
    async def stop_early(
        request: fake.pb.GenerateRequest, context: fake.Context
    ) -> AsyncIterator[fake.pb.GenerateResponse]:
        for message in (fake.started(request), fake.delta(0, [7]), fake.finished(request, 1)):
            yield message

    server.service.script = stop_early
    assert main(["bench", "--streams", "2", "--repeats", "1", "--address", server.address]) == 0
    told = capsys.readouterr().err
    assert "a run gave 2 tokens, not 256" in told
    assert "2 prompt tokens were found in the prefix cache" in told


@pytest.mark.parametrize(
    "flags",
    [
        ["--input-len", "0"],
        ["--input-len", "9-8"],
        ["--output-len", "x"],
        ["--rate", "0"],
        ["--processes", "0"],
        ["--scenario", "other"],
    ],
)
def test_flags_out_of_range_are_status_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *flags])
    assert caught.value.code == 2


def test_flags_that_cannot_be_followed_are_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for flags, sentence in (
        (["--plot", "out.png"], "--plot needs matplotlib: pip install 'duet-inference[plot]'"),
        (["--limit", "ceilings.json"], "--limit and --model-dir go together"),
    ):
        assert main(["bench", *flags]) == 2
        assert capsys.readouterr().err == f"duet: {sentence}\n"


def test_throughput_over_time_holds_every_token_once() -> None:
    streams = [Arrivals(1.0, [2.0, 5.0], [1, 2]), Arrivals(1.5, [3.1], [4])]
    edges, rates = plot.throughput(streams, 4)
    assert edges == [0, 1, 2, 3, 4]
    assert rates == [0, 1, 4, 2]


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="the extra `plot` is not installed")
def test_a_plot_is_drawn(tmp_path: Path) -> None:
    streams = [Arrivals(1.0, [2.0, 5.0], [1, 2]), Arrivals(1.5, [3.1], [4])]
    limit = Limit("some device", 1.0, 9.0, None, 0.1, 0.2, 0.3)
    for arrivals, line in ((streams, limit), (streams[1:], None)):
        plot.draw(tmp_path / "out.png", "title", arrivals, line)
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
