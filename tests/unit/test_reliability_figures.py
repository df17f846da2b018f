"""The programs of benchmarks/reliability notice what they are there for."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.reliability.comparison import Ended, compare
from benchmarks.reliability.memory import slope
from benchmarks.reliability.services import ServiceLog, quantiles
from tests.golden.oracle import Reference

LOG = """\
2026-01-01 00:00:00,000 core[1] INFO epoch 1 on CPU: limits
2026-01-01 00:00:01,000 executor[2] WARNING rank 0 ended (killed by SIGKILL): restarting it
2026-01-01 00:00:03,500 rank 0[3] INFO listening on port 1
2026-01-01 00:00:04,000 executor[2] WARNING rank 0 ended as soon as it was ready (killed by SIGKILL): starting it \
again in 0.1 s
2026-01-01 00:00:05,000 scheduler[4] WARNING core ended (killed by SIGKILL): restarting it
2026-01-01 00:00:05,100 executor[2] WARNING rank 0 ended before it was ready (killed by SIGKILL): starting it again \
in 0.2 s
2026-01-01 00:00:07,300 rank 0[5] INFO listening on port 1
"""
UNREADY = (
    "2026-01-01 00:00:10,000 executor[2] WARNING rank 0 ended before it was ready (exit status 1): starting it again "
    "in 0.4 s\n"
)
LAST_WORD = "2026-01-01 00:00:20,000 executor[2] WARNING rank 0 ended (killed by SIGKILL): restarting it\n"
REFERENCE = Reference([7], [1, 2, 3], [4, 5, 6], [1.0, 1e-5, 1.0])


class Model:
    """Goes on with nines, whatever came before."""

    def generate(self, prompt: Sequence[int], num_tokens: int) -> Reference:
        return Reference(list(prompt), [9] * num_tokens, [8] * num_tokens, [1.0] * num_tokens)


def written(directory: Path, text: str) -> ServiceLog:
    path = directory / "log"
    path.write_text(text)
    return ServiceLog(path)


def test_failed_starts_are_counted_in_a_row(tmp_path: Path):
    assert written(tmp_path, LOG).failed_starts() == 1
    assert written(tmp_path, LOG + UNREADY).failed_starts() == 2
    assert written(tmp_path, LOG + UNREADY + LAST_WORD).failed_starts() == 0


def test_a_start_lasts_from_the_end_of_the_wait_until_the_port_is_open(tmp_path: Path):
    assert written(tmp_path, LOG).executor_starts_s() == pytest.approx([2.5, 2.0])


@pytest.mark.parametrize(
    ("tokens", "difference"),
    [
        ([1, 2], "2 tokens, not 3"),
        ([1, 2, 2], "another token, and no near tie"),
        ([1, 5, 3], "another token, and no near tie"),  # what follows a near tie is the model's, too
        ([1, 6, 9], "another token, and no near tie"),  # not the second best
    ],
)
def test_streams_that_differ_are_named(tokens: list[int], difference: str):
    compared = compare([Ended(0, tokens, "")], [(REFERENCE, "")], Model())
    assert difference in compared.differences[0]


def test_near_ties_are_counted_and_other_texts_of_the_same_tokens(capsys: pytest.CaptureFixture[str]):
    streams = [Ended(0, [1, 2, 3], "abc"), Ended(0, [1, 5, 9], "xyz"), Ended(0, [1, 2, 3], "ab")]
    compared = compare(streams, [(REFERENCE, "abc")], Model())
    assert (compared.differences, len(compared.near_ties), compared.num_other_texts) == ([], 1, 1)


def test_the_slope_is_that_of_the_line_and_its_error_zero_where_all_points_lie_on_it():
    rows = [(60.0 * minute, 1000.0 + 8 * minute) for minute in range(5)]
    line = slope(rows)
    assert (line["slope_kib_per_min"], line["standard_error"]) == pytest.approx((8, 0))


def test_quantiles_are_of_the_nearest_rank():
    assert quantiles([float(value) for value in range(1, 201)]) == {"count": 200, "p50": 100.0, "p99": 198.0}
    assert quantiles([]) == {"count": 0}
