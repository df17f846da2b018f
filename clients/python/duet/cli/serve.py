"""`duet serve`: both services in the foreground."""

import argparse
import os
import shutil
import sys
import threading

from duet.client import DEFAULT_ADDRESS
from duet.launch import hang_timeout_s, service_children, wait_for_session
from servicekit.lifeline import bind_to_parent
from servicekit.logs import log_to_stderr
from servicekit.supervisor import Supervisor, stop_on_signals

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "*": "127.0.0.1"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = (
        "Start the scheduler service and the executor service, restart what dies or hangs, and stop both: at once on "
        "Ctrl-C, on SIGTERM once streams have ended or --drain-s is over."
    )
    parser.epilog = (
        "Further flags are passed on: see `python -m scheduler_service --help` and `python -m executor_service --help`."
    )
    parser.add_argument("model", metavar="DIR", help="Hugging Face directory of a supported model")
    parser.add_argument("--listen", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help="for clients (%(default)s)")
    parser.add_argument(
        "--executor-listen", default="127.0.0.1:50052", metavar="HOST:PORT", help="of the executor (%(default)s)"
    )
    parser.add_argument(
        "--record", metavar="FILE", help="record what the two services say to each other, for `duet replay`"
    )


def run(args: argparse.Namespace) -> int:
    """Supervise both services until Ctrl-C, or until SIGTERM and the end of the streams."""
    bind_to_parent()
    log_to_stderr("duet")
    stop = stop_on_signals()
    address = client_address(args.listen)

    def announce() -> None:
        if wait_for_session(address, lambda: stop.asked):
            print(f"\nReady at {args.listen}. Try this in another terminal:\n\n  {_example(address)}\n", flush=True)

    supervisor = Supervisor(
        service_children(args.model, args.listen, args.executor_listen, args.rest, record=args.record),
        on_ready=lambda: threading.Thread(target=announce, daemon=True).start(),
        hang_timeout_s=hang_timeout_s(args.rest),
    )
    return 1 if supervisor.run(stop) else 0


def client_address(listen: str) -> str:
    """Where a client on this machine finds a server that listens at `listen`."""
    host, _, port = listen.rpartition(":")
    return f"{_WILDCARDS.get(host, host)}:{port}"


def _example(address: str) -> str:
    where = "" if address == DEFAULT_ADDRESS else f" --address {address}"
    return f"{_command()} chat{where}"


def _command() -> str:
    """How this program was started, in the shortest words that start the same one."""
    program = sys.argv[0]
    if os.path.basename(program) != "duet":
        return "python -m duet"
    found = shutil.which("duet")
    return "duet" if found and os.path.exists(program) and os.path.samefile(found, program) else program
