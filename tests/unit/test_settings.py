"""Flags out of dataclasses: the bounds of every numeric setting of both services."""

from typing import Any

import pytest

from executor_service.config import ExecutorConfig
from scheduler_service.config import SchedulerConfig
from servicekit.settings import parse, to_argv

# (configuration, flag, smallest value, a value below it)
LEAST = [
    (SchedulerConfig, "--max-waiting", "1", "0"),
    (SchedulerConfig, "--max-inflight-steps", "1", "0"),
    (SchedulerConfig, "--max-decode-stall-ms", "0", "-1"),
    (SchedulerConfig, "--max-pause-s", "0", "-0.5"),
    (SchedulerConfig, "--max-pause-s", "0", "nan"),
    (ExecutorConfig, "--block-size", "1", "0"),
    (ExecutorConfig, "--num-blocks", "1", "0"),
    (ExecutorConfig, "--memory-utilization", "0.01", "0"),
    (ExecutorConfig, "--max-num-seqs", "1", "0"),
    (ExecutorConfig, "--max-tokens-per-step", "1", "0"),
    (ExecutorConfig, "--max-model-len", "2", "1"),
    (ExecutorConfig, "--num-threads", "1", "-1"),
]


def parsed(config: type[Any], *flags: str) -> Any:
    return parse(config, ["--model", "tiny", *flags], prog="service", description="")


@pytest.mark.parametrize(("config", "flag", "least", "below"), LEAST)
def test_number_below_its_bound_is_refused_with_flag_and_bound(
    config: type[Any], flag: str, least: str, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = parsed(config, f"{flag}={least}")
    assert parse(config, to_argv(settings), prog="service", description="") == settings
    with pytest.raises(SystemExit) as end:
        parsed(config, f"{flag}={below}")
    assert end.value.code == 2
    assert f"argument {flag}: must be at least {least}, not {below}" in capsys.readouterr().err


def test_share_of_memory_above_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(ExecutorConfig, "--memory-utilization=1").memory_utilization == 1
    with pytest.raises(SystemExit):
        parsed(ExecutorConfig, "--memory-utilization=1.01")
    assert "argument --memory-utilization: must be at most 1, not 1.01" in capsys.readouterr().err


def test_what_is_no_number_is_named_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(ExecutorConfig, "--block-size=many")
    assert "argument --block-size: invalid int value: 'many'" in capsys.readouterr().err
