"""The core with a real grammar worker: constrained requests through the engine, and workers that die, hang or lie."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.core import masks
from scheduler_service.grammar_source import to_grammar
from scheduler_service.ipc import Cancel, Failed, Finished, Sampling
from tests.small_model import EOS, byte_level_bpe, metaspace_unigram, write_model
from tests.unit.core_harness import CANCELLED, LENGTH, STOP, continuation
from tests.unit.engine_harness import FrontEnd, Setting

HOSTILE = pb.Constraint(grammar="start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(40)) + 'T40: "z"')
DIES_OF_ITS_FIRST_JOB = """
import os, sys
from scheduler_service.core.grammar_jobs import Ready
from scheduler_service.core.grammar_worker import send
send(1, Ready())
os.read(0, 1)
"""


@pytest.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    setting = Setting(write_model(tmp_path))
    await setting.start_executor()
    yield setting
    await setting.stop()
    assert workers() == [], "a worker outlived the core"


@pytest.fixture
async def frontend(setting: Setting) -> FrontEnd:
    frontend = await setting.connect()
    await frontend.ready()
    return frontend


def workers() -> list[int]:
    """The living grammar workers of this process."""
    tasks = Path("/proc/self/task").iterdir()
    pids = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return [pid for pid in pids if b"grammar_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def worker() -> int:
    """The one that lives, as soon as it does."""
    async with asyncio.timeout(30):
        while not (pids := workers()):  # noqa: ASYNC110 (a process tells nobody that it began)
            await asyncio.sleep(0.01)
    return pids[0]


def submit(frontend: FrontEnd, stream: int, constraint: pb.Constraint, max_tokens: int = 60, **changes: Any) -> None:
    ends = {"stop_token_ids": [EOS], "end_token_ids": [EOS]} | changes
    prompt = range(100 * stream, 100 * stream + 10)
    frontend.submit(stream, prompt, max_tokens, constraint=to_grammar(constraint), **ends)


def regex(expression: str) -> pb.Constraint:
    return pb.Constraint(regex=expression)


def text(frontend: FrontEnd, stream: int) -> str:
    return byte_level_bpe().decode(frontend.tokens[stream], skip_special_tokens=True)


async def test_constrained_requests_get_texts_of_their_languages_beside_others(frontend: FrontEnd):
    for stream in range(1, 5):
        submit(frontend, stream, regex(f"[a-z]{{{stream},5}} [0-9]{{1,9}}!"))
    frontend.submit(5, range(20), 100)
    await frontend.until(lambda: len(frontend.ends) == 5)
    for stream in range(1, 5):
        assert re.fullmatch(rf"[a-z]{{{stream},5}} [0-9]{{1,9}}!", text(frontend, stream))
        assert frontend.finish_reason(stream) == STOP
        assert frontend.tokens[stream][-1] == EOS
    assert frontend.tokens[5] == continuation(range(20), 100)


async def test_choices_of_a_request_share_a_grammar_and_differ(frontend: FrontEnd):
    submit(frontend, 1, regex("[a-z]{12}"), streams=[1, 2, 3, 4])
    await frontend.until(lambda: len(frontend.ends) == 4)
    texts = {text(frontend, stream) for stream in range(1, 5)}
    assert len(texts) == 4
    assert all(re.fullmatch("[a-z]{12}", one) for one in texts)


async def test_a_text_ends_without_a_token_where_no_token_may_end_it(frontend: FrontEnd):
    submit(frontend, 1, pb.Constraint(choice=pb.Choice(texts=["red"])), stop_token_ids=[])
    submit(frontend, 2, regex(""), stop_token_ids=[])
    await frontend.until(lambda: len(frontend.ends) == 2)
    assert text(frontend, 1) == "red"
    assert 2 not in frontend.tokens
    for stream in (1, 2):
        end = frontend.ends[stream]
        assert isinstance(end, Finished)
        assert (end.reason, end.stop_token_id) == (STOP, None)


async def test_length_bans_and_minima_hold_under_a_constraint(frontend: FrontEnd):
    banned = [token for piece, token in byte_level_bpe().get_vocab().items() if "a" in piece]
    submit(frontend, 1, regex("[a-c]*"), max_tokens=9, sampling=Sampling(banned_token_ids=banned, min_tokens=9))
    await frontend.until(lambda: frontend.ends)
    assert (len(frontend.tokens[1]), frontend.finish_reason(1)) == (9, LENGTH)
    assert set(text(frontend, 1)) <= {"b", "c"}


async def test_a_wrong_grammar_is_the_callers_fault(frontend: FrontEnd):
    submit(frontend, 1, regex("(a"))
    submit(frontend, 2, regex("a"))
    await frontend.until(lambda: len(frontend.ends) == 2)
    failed = frontend.ends[1]
    assert isinstance(failed, Failed)
    assert (failed.code, failed.field) == ("INVALID_ARGUMENT", "constraint")
    assert "unclosed group" in failed.message
    assert text(frontend, 2) == "a"


async def test_cancel_and_deadline_hold_while_a_grammar_compiles_and_others_run(frontend: FrontEnd):
    frontend.submit(1, range(20), 150)
    submit(frontend, 2, HOSTILE)
    submit(frontend, 3, HOSTILE, deadline=asyncio.get_running_loop().time() + 0.1)
    frontend.send(Cancel(1, "", "request-2"))
    await frontend.until(lambda: {1, 2, 3} <= frontend.ends.keys())
    assert frontend.finish_reason(2) == CANCELLED
    assert frontend.error(3) == ("DEADLINE_EXCEEDED", "DeadlineExceeded")
    assert frontend.tokens[1] == continuation(range(20), 150)
    submit(frontend, 4, regex("b"))
    await frontend.until(lambda: 4 in frontend.ends)
    assert text(frontend, 4) == "b"


async def test_requests_go_on_when_the_worker_dies(frontend: FrontEnd, caplog: pytest.LogCaptureFixture):
    for stream in range(1, 5):
        submit(frontend, stream, regex("[a-z]{100,}"), max_tokens=150, stop_token_ids=[])
    frontend.submit(5, range(20), 200)
    for count in (10, 40, 90):
        await frontend.until(
            lambda count=count: min(len(frontend.tokens.get(stream, ())) for stream in range(1, 5)) > count
        )
        os.kill(await worker(), signal.SIGKILL)
    await frontend.until(lambda: len(frontend.ends) == 5)
    for stream in range(1, 5):
        assert re.fullmatch("[a-z]{100,}", text(frontend, stream))
        assert (len(frontend.tokens[stream]), frontend.finish_reason(stream)) == (150, LENGTH)
    assert frontend.tokens[5] == continuation(range(20), 200)
    assert "the grammar worker died" in caplog.text


async def test_a_worker_that_hangs_is_replaced(frontend: FrontEnd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(masks, "MAX_CONSUME_S", 0.3)
    submit(frontend, 1, regex("[a-z]{100,}"), max_tokens=150, stop_token_ids=[])
    await frontend.until(lambda: len(frontend.tokens.get(1, ())) > 10)
    os.kill(await worker(), signal.SIGSTOP)
    await frontend.until(lambda: frontend.ends)
    assert re.fullmatch("[a-z]{100,}", text(frontend, 1))


@pytest.mark.parametrize("script", [DIES_OF_ITS_FIRST_JOB, "", "/no/such/program"])
async def test_a_worker_that_never_gets_anywhere_fails_constrained_requests_alone(
    frontend: FrontEnd, monkeypatch: pytest.MonkeyPatch, script: str
):
    command = (script,) if script.startswith("/") else (sys.executable, "-c", script)
    monkeypatch.setattr(masks, "WORKER", command)
    submit(frontend, 1, regex("a"))
    frontend.submit(2, range(20), 100)
    await frontend.until(lambda: len(frontend.ends) == 2)
    assert frontend.error(1) == ("INTERNAL", "InternalError")
    assert frontend.tokens[2] == continuation(range(20), 100)
    monkeypatch.undo()
    submit(frontend, 3, regex("a"))
    await frontend.until(lambda: 3 in frontend.ends)
    assert text(frontend, 3) == "a", "the next request tries again"


async def test_a_tokenizer_that_cannot_be_constrained_fails_every_constrained_request(tmp_path: Path):
    setting = Setting(write_model(tmp_path, metaspace_unigram()))
    await setting.start_executor()
    frontend = await setting.connect()
    await frontend.ready()
    submit(frontend, 1, regex("a"))
    await frontend.until(lambda: 1 in frontend.ends)
    submit(frontend, 2, regex("a"))
    frontend.submit(3, range(20), 9)
    await frontend.until(lambda: len(frontend.ends) == 3)
    for stream in (1, 2):
        failed = frontend.ends[stream]
        assert isinstance(failed, Failed)
        assert (failed.code, failed.field) == ("INVALID_ARGUMENT", "constraint")
        assert "tokenizer cannot be constrained" in failed.message
    assert frontend.tokens[3] == continuation(range(20), 9)
    await setting.stop()


async def test_an_executor_that_dies_changes_no_text(tmp_path: Path):
    setting = Setting(write_model(tmp_path))
    await setting.start_executor(die_after_plans=7)
    frontend = await setting.connect()
    await frontend.ready()
    for stream in range(1, 4):
        submit(frontend, stream, regex("[a-z]{20,30}[0-9]"))
    await frontend.until(lambda: frontend.status and not frontend.status.ready)
    await setting.kill_executor()
    await setting.start_executor()
    await frontend.until(lambda: len(frontend.ends) == 3)
    assert all(re.fullmatch("[a-z]{20,30}[0-9]", text(frontend, stream)) for stream in range(1, 4))
    await setting.stop()
