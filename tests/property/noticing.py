"""Whether the model check notices a bug that was put in."""

from collections.abc import Callable

import pytest

from tests.property.session_driver import SessionRun

MAX_RUNS_TO_NOTICE = 600


def assert_noticed(make_run: Callable[[int], SessionRun] = SessionRun) -> None:
    """Some run fails, and by an assertion: that the core stumbles over its own state is not enough."""
    for seed in range(MAX_RUNS_TO_NOTICE):
        try:
            make_run(seed).run()
        except AssertionError as error:
            print(f"run {seed}: {type(error).__name__}: {error}")
            return
        except (KeyError, IndexError):
            continue
    pytest.fail(f"not noticed in {MAX_RUNS_TO_NOTICE} runs")
