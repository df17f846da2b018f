"""`duet record`: a recorder between a scheduler and its executor."""

import argparse
import asyncio
import logging
import signal
from pathlib import Path

from duet.cli.exit_status import DONE, CommandFailed
from duet.recorder import ListenError, record
from duet.recording import InvalidRecording, RecordingWriter
from servicekit.lifeline import Heartbeat, bind_to_parent
from servicekit.logs import log_to_stderr

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = (
        "Write down, until Ctrl-C, what a scheduler and its executor say to each other; start the scheduler with "
        "--executor and the address of --listen. `duet serve DIR --record FILE` does all of it."
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the recording; one that is there goes on")
    parser.add_argument(
        "--listen", default="127.0.0.1:50062", metavar="HOST:PORT", help="for the scheduler (%(default)s)"
    )
    parser.add_argument(
        "--executor", default="127.0.0.1:50052", metavar="HOST:PORT", help="of the executor (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Record until Ctrl-C or SIGTERM."""
    bind_to_parent()
    log_to_stderr("recorder")
    try:
        with RecordingWriter(args.file) as writer:
            asyncio.run(_record(writer, args))
    except (InvalidRecording, ListenError) as error:
        raise CommandFailed(str(error)) from None
    return DONE


async def _record(writer: RecordingWriter, args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    def on_listening(port: int) -> None:
        log.info("listening on port %d, recording to %s", port, args.file)
        Heartbeat().beat_in_loop()

    await record(writer, args.listen, args.executor, stop, on_listening)
