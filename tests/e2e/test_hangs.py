"""Processes that are stopped, as by SIGSTOP or a debugger that was left alone: found, killed and replaced."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from duet import LLM, Client, SamplingParams
from duet.launch import wait_for_session
from tests.e2e.conftest import FLAGS
from tests.e2e.system import PATIENCE_S, PROBE, System, is_alive, wait_until


@pytest.fixture(scope="module")
def watched(tiny_model: Path) -> Iterator[System]:
    """Whose processes are taken for hung after a silence of 1 s."""
    with LLM(str(tiny_model), **FLAGS, max_num_seqs=8, num_blocks=1024, hang_timeout_s=1) as llm:
        system = System(llm.address)
        try:
            yield system
        finally:
            system.close()


@pytest.mark.parametrize(
    "module",
    [
        "executor_service.rank",
        "scheduler_service.core",
        "scheduler_service.frontend",
        "executor_service",
        "scheduler_service",
    ],
)
def test_a_process_that_is_stopped_is_replaced(watched: System, module: str) -> None:
    before = watched.pids()
    os.kill(before[module], signal.SIGSTOP)
    wait_until(lambda: not is_alive(before[module]))
    assert wait_for_session(watched.address, lambda: False, PATIENCE_S)
    with Client(watched.address) as client:
        params = SamplingParams(temperature=0, max_tokens=len(watched.sound_tokens), ignore_eos=True)
        assert client.generate(PROBE, params).token_ids == watched.sound_tokens
    assert watched.pids().keys() == before.keys()
