"""One fleet for all tests: what `make run-gateway REPLICAS=2` starts, over the tiny model of tests/e2e."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import tiny_model
from tests.gateway.fleet import Fleet, running_fleet

__all__ = ["tiny_model"]

# Writes into the prompt what a template may be given beside the messages.
_REST = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{{ reasoning_effort or verbosity or '' }}"


@pytest.fixture(scope="session")
def _fleet(tiny_model: Path) -> Iterator[Fleet]:
    if importlib.util.find_spec("smg") is None:
        pytest.skip("the gateway has wheels for x86-64 alone")
    path = tiny_model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": config["chat_template"] + _REST}))
    with running_fleet(tiny_model) as fleet:
        yield fleet


@pytest.fixture
def fleet(_fleet: Fleet) -> Iterator[Fleet]:
    """Two servers behind the gateway, which hold no request after each test."""
    yield _fleet
    for replica in _fleet.replicas:
        replica.wait_idle()
