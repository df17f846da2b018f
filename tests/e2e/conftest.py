"""A tiny model with random weights, and the services that serve it: one pair for each set of flags."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from duet import LLM
from tests.e2e.system import System
from tests.tiny_llama import write_tiny_llama

FLAGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 16, "num_threads": 1}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Llama that computes a step in a millisecond and continues any prompt differently."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@contextlib.contextmanager
def _running(model: Path, **flags: Any) -> Iterator[System]:
    with LLM(str(model), **FLAGS, **flags) as llm:
        system = System(llm.address)
        try:
            yield system
        finally:
            system.close()


@pytest.fixture(scope="session")
def _roomy(tiny_model: Path) -> Iterator[System]:
    with _running(tiny_model, max_num_seqs=16, num_blocks=1024) as system:
        yield system


@pytest.fixture(scope="session")
def _narrow(tiny_model: Path) -> Iterator[System]:
    flags = {"max_num_seqs": 1, "num_blocks": 500, "max_waiting": 100, "queue_order": "priority"}
    with _running(tiny_model, **flags) as system:
        yield system


@pytest.fixture
def server(_roomy: System) -> Iterator[System]:
    """Room for 16 requests and for the longest sequence, first come first served; unharmed after each test."""
    yield _roomy
    _roomy.assert_unharmed()


@pytest.fixture
def narrow_server(_narrow: System) -> Iterator[System]:
    """One request at a time, by priority, 100 may wait; a KV cache of 8,000 tokens. Unharmed after each test."""
    yield _narrow
    _narrow.assert_unharmed()


@pytest.fixture(scope="module")
def mortal_server(tiny_model: Path) -> Iterator[System]:
    """For tests that kill its processes."""
    with _running(tiny_model, max_num_seqs=8, num_blocks=1024, max_pause_s=60) as system:
        yield system
