"""The real services with a model that never ends by itself, and every client built once."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from duet import LLM
from tests.clients.programs import BuildFailed, Program, build
from tests.e2e.conftest import FLAGS, tiny_model
from tests.e2e.system import System
from tests.unit.fake_inference import FakeInference, ServerThread

__all__ = ["tiny_model"]

LANGUAGES = ("node", "go", "cpp", "java")


@pytest.fixture(scope="session")
def _running(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(tiny_model, directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    with LLM(str(directory), **FLAGS, max_num_seqs=4, num_blocks=1024) as llm:
        system = System(llm.address)
        try:
            yield system
        finally:
            system.close()


@pytest.fixture
def server(_running: System) -> Iterator[System]:
    """Unharmed after each test; its model has no end of sequence."""
    yield _running
    _running.assert_unharmed()


@pytest.fixture(scope="session")
def _fake() -> Iterator[ServerThread]:
    with ServerThread() as server:
        yield server


@pytest.fixture
def fake(_fake: ServerThread) -> Iterator[FakeInference]:
    """A service whose answers a test decides, served at `fake_address`."""
    service = _fake.service
    script, service.requests = service.script, []
    yield service
    service.script = script


@pytest.fixture
def fake_address(_fake: ServerThread) -> str:
    return _fake.address


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=[] if name == "node" else pytest.mark.clients) for name in LANGUAGES],
)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """One language's client; Node's tests are skipped where npm cannot install what it needs."""
    try:
        return build(request.param, tmp_path_factory.mktemp(request.param))
    except BuildFailed as error:
        if request.param == "node":
            pytest.skip(f"npm cannot install the client for Node: {error}")
        pytest.fail(str(error))
