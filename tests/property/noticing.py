"""Whether the model check notices a bug that was put in."""

from collections.abc import Callable

import pytest

from tests.property.session_driver import SessionRun

MAX_RUNS_TO_NOTICE = 600


def given_to(*disturbances: str) -> Callable[[int], SessionRun]:
    """Runs that are often disturbed by these methods of SessionRun alone, and whose clients all come back."""

    def make_run(seed: int) -> SessionRun:
        run = SessionRun(seed)
        run.disturbance, run.detachable = 0.1, 1.0
        run.disturbances = [getattr(run, name) for name in disturbances]
        return run

    return make_run


def full_of_poison(seed: int) -> SessionRun:
    """A run whose requests are often such that executors die of them, and whose executors die of nothing else."""
    run = given_to("leave")(seed)
    run.poisonous = 0.3
    return run


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
