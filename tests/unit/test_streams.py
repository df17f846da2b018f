"""A stream's buffer between the core's frames and a client's writes."""

import asyncio

from scheduler_service import ipc
from scheduler_service.errors import QueueFull
from scheduler_service.frontend.streams import TokenStream

STARTED = ipc.Started(stream=1, prompt_tokens=3, cached_tokens=0, queue_time_ns=5)
FINISHED = ipc.Finished(1, 2, None, 3, 0, 4, 0, 0)


async def test_everything_unsent_comes_in_one_piece_of_news() -> None:
    stream = TokenStream(1)
    stream.start(STARTED)
    for token_id in range(1000):
        stream.push(token_id)
    stream.end(FINISHED)
    news = await stream.take()
    assert (news.started, news.token_ids, news.end) == (STARTED, list(range(1000)), FINISHED)


async def test_news_is_told_once() -> None:
    stream = TokenStream(1)
    stream.start(STARTED)
    stream.push(7)
    await stream.take()
    stream.push(8)
    news = await stream.take()
    assert (news.started, news.token_ids, news.end) == (None, [8], None)


async def test_taking_waits_for_the_next_token() -> None:
    stream = TokenStream(1)
    taking = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    assert not taking.done()
    stream.push(3)
    assert (await taking).token_ids == [3]


async def test_tokens_before_an_error_are_kept() -> None:
    stream = TokenStream(1)
    error = QueueFull("full")
    stream.push(3)
    stream.end(error)
    news = await stream.take()
    assert (news.token_ids, news.end) == ([3], error)
