"""A fake inference service, and a client of it, for tests of what is around the client."""

from collections.abc import Iterator

import pytest

from duet import Client
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
