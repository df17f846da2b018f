"""A choice's buffer between the core's frames and a client's writes."""

import asyncio

import pytest

from scheduler_service import ipc
from scheduler_service.errors import QueueFull
from scheduler_service.frontend.streams import TokenStream

STARTED = ipc.Started(stream=1, prompt_tokens=3, cached_tokens=0, queue_time_ns=5, seed=6)
FINISHED = ipc.Finished(1, 2, None, 3, 0, 4, 0, 0)


@pytest.fixture
def news() -> asyncio.Event:
    return asyncio.Event()


async def test_all_unsent_tokens_are_taken_at_once_and_only_once(news: asyncio.Event) -> None:
    stream = TokenStream(1, news)
    for token_id in range(1000):
        stream.push(token_id)
    assert stream.take() == list(range(1000))
    stream.push(8)
    assert stream.take() == [8]
    assert stream.take() == []


async def test_whatever_happens_is_news(news: asyncio.Event) -> None:
    stream = TokenStream(1, news)
    for happen in (lambda: stream.start(STARTED), lambda: stream.push(7), lambda: stream.finish(FINISHED)):
        news.clear()
        happen()
        assert news.is_set()
    assert (stream.started, stream.take(), stream.end) == (STARTED, [7], FINISHED)


async def test_choices_share_their_news(news: asyncio.Event) -> None:
    first, second = TokenStream(1, news), TokenStream(2, news)
    waiting = asyncio.create_task(news.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    second.push(3)
    await waiting
    assert (first.take(), second.take()) == ([], [3])


async def test_tokens_before_an_error_are_kept(news: asyncio.Event) -> None:
    stream = TokenStream(1, news)
    error = QueueFull("full")
    stream.push(3)
    stream.finish(error)
    assert (stream.take(), stream.end) == ([3], error)
