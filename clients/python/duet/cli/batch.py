"""A batch: prompts in JSON lines, answered many at once, written in order, resumable."""

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from duet.cli.batch_files import Line, OutputFile, encode
from duet.cli.exit_status import CommandFailed
from duet.cli.json_fields import OPTION_NAMES, change_params, parse_prompt, pick_options
from duet.client import AsyncClient
from duet.errors import DuetError, InvalidRequest, Unavailable
from duet.output import Event, Output
from duet.params import Options, SamplingParams
from duet.progress import Progress
from duet.retry import Attempts, Retry

T = TypeVar("T")
R = TypeVar("R")

_HELD = 4  # results that may wait for their turn, for each stream at once
# A server that is restarted in the midst of a batch loads its model first.
_RETRY = Retry(max_attempts=10, first_delay_s=1.0, waits_for_queue=True)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What counts for every line that does not say otherwise."""

    params: SamplingParams
    options: Options
    chat: bool  # whether a text is a user's message

    def digest_of(self, line: Line) -> str:
        """What tells whether a record was made from this line with these defaults."""
        own = hashlib.blake2b(json.dumps(dataclasses.asdict(self), sort_keys=True).encode())
        return hashlib.blake2b(line.text, key=own.digest(), digest_size=6).hexdigest()


@dataclasses.dataclass(frozen=True)
class Record:
    """What one line gave."""

    line: Line
    text: bytes  # as JSON
    error: DuetError | None


class Batch:
    """The requests of a batch, on one connection.

    A request that loses its server is sent again as a whole, since nothing of it has been written.
    """

    def __init__(
        self, client: AsyncClient, defaults: Defaults, progress: Progress, *, timeout_s: float | None, has_digests: bool
    ) -> None:
        """`has_digests`: whether records tell what they were made from. The client must not retry by itself."""
        self._client = client
        self._defaults = defaults
        self._progress = progress
        self._timeout_s = timeout_s
        self._has_digests = has_digests

    async def record(self, line: Line) -> Record:
        """Have one line answered, or refused. Raises: Unavailable, where no patience helps."""
        fields: dict[str, Any] = {"index": line.index}
        error: DuetError | None = None
        try:
            wanted = _parse_object(line.text)
            if "id" in wanted:
                fields["id"] = wanted.pop("id")
            output = await self._answer(wanted)
            fields |= output.as_dict() | {"index": line.index}
        except Unavailable:
            raise
        except DuetError as failure:
            error = failure
            fields |= {"line": line.number, "error": error_fields(failure)}
        if self._has_digests:
            fields["input_digest"] = self._defaults.digest_of(line)
        return Record(line, encode(fields), error)

    async def _answer(self, wanted: dict[str, Any]) -> Output:
        prompt = parse_prompt(wanted.pop("prompt", None), chat=self._defaults.chat)
        options = pick_options(self._defaults.options, wanted)
        changes = {name: value for name, value in wanted.items() if name not in OPTION_NAMES}
        params = change_params(self._defaults.params, changes)
        attempts = Attempts(_RETRY, self._timeout_s)
        while True:
            events: list[Event] = []
            try:
                async for event in self._client.stream(prompt, params, timeout_s=attempts.remaining_s(), **options):
                    events.append(event)
                    self._progress.count(event)
                return Output.of(events)
            except DuetError as error:
                delay_s = attempts.delay_s(error)
                if delay_s is None:
                    raise
            await asyncio.sleep(delay_s)


async def unfinished(
    lines: AsyncIterator[Line], output: OutputFile, defaults: Defaults, skip: Callable[[Line, bool], None]
) -> AsyncIterator[Line]:
    """The lines that have no record in `output` yet; `skip` hears of the others, and whether they failed.

    Raises: CommandFailed where the records were made from something else.
    """
    async for line in lines:
        record = output.next_finished()
        if record is None:
            yield line
        elif record.get("input_digest") == defaults.digest_of(line):
            skip(line, "error" in record)
        else:
            raise CommandFailed(f"{output.where}: it was not made from line {line.number} of the input, or other flags")
    if output.next_finished() is not None:
        raise CommandFailed(f"{output.where}: the input has no line for it")


async def map_in_order(
    items: AsyncIterator[T], work: Callable[[T], Awaitable[R]], take: Callable[[R], None], *, concurrency: int
) -> None:
    """Give `take` what `work` makes of each item, in the order of the items.

    At most `concurrency` are worked on at once, and four times as many are read ahead of the one that is taken. The
    first error of any of the three ends all and is raised.
    """
    started: asyncio.Queue[asyncio.Task[R] | None] = asyncio.Queue(_HELD * concurrency)
    running = asyncio.Semaphore(concurrency)

    async def work_in_turn(item: T) -> R:
        async with running:
            return await work(item)

    async def start() -> None:
        async for item in items:
            await started.put(group.create_task(work_in_turn(item)))
        await started.put(None)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(start())
            while (task := await started.get()) is not None:
                take(await task)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def error_fields(error: DuetError) -> dict[str, Any]:
    """An error for JSON."""
    fields = {"kind": type(error).__name__, "message": error.message, "field": error.field, "reason": error.reason}
    return {name: value for name, value in fields.items() if value is not None}


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"it is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("it is no JSON object")
    return value
