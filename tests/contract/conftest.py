from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.frontend_harness import World, make_world
from tests.contract.session_harness import Executor, ScriptedRunner, running


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with make_world(tmp_path) as world:
        yield world


@pytest.fixture
async def executor() -> AsyncIterator[Executor]:
    async with running(ScriptedRunner()) as executor:
        yield executor
