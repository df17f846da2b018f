"""How long the session's model check goes on."""

import pytest

NUM_RUNS = 2_500  # under a minute on one core


def pytest_addoption(parser: pytest.Parser) -> None:
    """Read only where pytest is told of this directory, or of a file in it."""
    text = f"random lives that the session's model check leads; without it {NUM_RUNS}"
    parser.addoption("--session-runs", type=int, help=text)


@pytest.fixture
def num_session_runs(request: pytest.FixtureRequest) -> int:
    """Random lives that the session's model check leads."""
    num_runs = request.config.getoption("--session-runs", default=None)
    return NUM_RUNS if num_runs is None else num_runs
