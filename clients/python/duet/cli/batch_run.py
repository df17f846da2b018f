"""The batch of `duet generate`: its files, its bar, what it says of lines that fail."""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from duet.cli.batch import Batch, Defaults, Record, map_in_order, unfinished
from duet.cli.batch_files import Line, OutputFile, count_lines, encode, read_lines
from duet.cli.exit_status import DONE, FAILED, CommandFailed
from duet.client import AsyncClient, Client
from duet.progress import Progress

_CONCURRENCY = 256  # more than a server runs, fewer than its queue takes


def run_batch(args: argparse.Namespace, defaults: Defaults, texts: Sequence[str] | None, output: Path | None) -> int:
    """Answer `texts`, or the lines of --input where they are None; returns the exit status.

    Raises: DuetError, CommandFailed; the output ends with a whole record all the same.
    """
    with Client(args.address) as client:
        client.model()  # fails at once where there is no server, for which the batch would wait
    with (
        _open_input(args.input) as file,
        contextlib.closing(OutputFile(output, resume=args.resume)) as out,
        _open_bar(args, file) as bar,
    ):
        run = _Run(args, out, Progress(bar))
        asyncio.run(run.generate(defaults, _argument_lines(texts) if texts is not None else read_lines(file)))
    if run.failures:
        print(f"duet: {len(run.failures)} lines failed, the first is line {run.failures[0]}", file=sys.stderr)
    return FAILED if run.failures else DONE


class _Run:
    def __init__(self, args: argparse.Namespace, output: OutputFile, progress: Progress) -> None:
        self._args = args
        self._output = output
        self._progress = progress
        self.failures: list[int] = []  # numbers of lines, those of an earlier run too

    async def generate(self, defaults: Defaults, lines: AsyncIterator[Line]) -> None:
        """Have all lines answered and written."""
        args = self._args
        async with AsyncClient(args.address, retry=None) as client:
            has_digests = args.input is not None
            batch = Batch(client, defaults, self._progress, timeout_s=args.timeout, has_digests=has_digests)
            todo = unfinished(lines, self._output, defaults, self._skip)
            await map_in_order(todo, batch.record, self._take, concurrency=args.concurrency or _CONCURRENCY)

    def _take(self, record: Record) -> None:
        if record.error is not None:
            if self._args.input is None:
                raise record.error
            message = f"line {record.line.number}: {record.error.message}"
            if self._args.stop_on_error:
                raise CommandFailed(message)
            tqdm.write(f"duet: {message}", file=sys.stderr)
            self.failures.append(record.line.number)
        self._output.write(record.text)
        self._progress.count_finished()

    def _skip(self, line: Line, failed: bool) -> None:
        self._progress.skip()
        if failed:
            self.failures.append(line.number)


@contextlib.contextmanager
def _open_input(name: str | None) -> Iterator[BinaryIO]:
    if name in (None, "-"):
        yield sys.stdin.buffer
    else:
        with open(name, "rb") as file:
            yield file


def _open_bar(args: argparse.Namespace, file: BinaryIO) -> "tqdm[Any]":
    wanted = sys.stderr.isatty() if args.progress is None else args.progress
    if args.input is None or not wanted:
        return tqdm(disable=True)
    return tqdm(desc="Generating", total=count_lines(file), dynamic_ncols=True)


async def _argument_lines(texts: Sequence[str]) -> AsyncIterator[Line]:
    for index, text in enumerate(texts):
        yield Line(index, index + 1, encode({"prompt": text}))
