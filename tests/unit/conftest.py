"""A fake inference service and a client of it, for the client; a core between two fakes, for the engine."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from duet import Client
from tests.unit.engine_harness import Setting
from tests.unit.fake_inference import FakeInference, ServerThread


@pytest.fixture
def server() -> Iterator[ServerThread]:
    with ServerThread() as running:
        yield running


@pytest.fixture
def service(server: ServerThread) -> FakeInference:
    return server.service


@pytest.fixture
def client(server: ServerThread) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


@pytest.fixture
async def make_setting(tmp_path: Path) -> AsyncIterator[Callable[..., Setting]]:
    settings: list[Setting] = []

    def make(**options: float) -> Setting:
        settings.append(Setting(tmp_path, **options))
        return settings[-1]

    yield make
    for setting in settings:
        await setting.stop()


@pytest.fixture
def setting(make_setting: Callable[..., Setting]) -> Setting:
    return make_setting()
