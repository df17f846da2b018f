"""`duet gateway`: OpenAI's HTTP API in front of one or several servers."""

import argparse
import dataclasses
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence

from duet.cli.exit_status import CommandFailed
from duet.cli.serve import client_address
from duet.client import DEFAULT_ADDRESS
from duet.launch import hang_timeout_s, service_children
from servicekit.child_process import Child
from servicekit.lifeline import bind_to_parent
from servicekit.logs import log_to_stderr
from servicekit.supervisor import Supervisor, stop_on_signals

_DEFAULT_HTTP = "127.0.0.1:8000"
# A server that was restarted gets requests again after seconds, where SMG's own defaults take minutes.
_SMG_FLAGS = (
    "--policy=cache_aware",
    "--log-level=warn",
    "--worker-startup-check-interval=3",
    "--health-check-interval-secs=5",
    "--health-failure-threshold=2",
    "--health-success-threshold=1",
    "--cb-timeout-duration-secs=5",
    "--shutdown-grace-period-secs=2",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = (
        "Start the SMG gateway, which serves /v1/chat/completions, /v1/completions and /v1/models, and behind it "
        "servers on this machine, or none but those given with --server; stop all on Ctrl-C."
    )
    parser.epilog = "Further flags are passed on to the services, as by `duet serve`."
    parser.add_argument(
        "model", metavar="DIR", nargs="?", help="Hugging Face directory of a supported model; none with --server"
    )
    parser.add_argument(
        "--http", type=_address, default=_DEFAULT_HTTP, metavar="HOST:PORT", help="for HTTP clients (%(default)s)"
    )
    parser.add_argument(
        "--metrics",
        type=_address,
        metavar="HOST:PORT",
        help="for Prometheus, which reads /metrics (default: the port after --http)",
    )
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="servers to start (%(default)s)")
    parser.add_argument(
        "--listen",
        type=_address,
        default=DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help="of the first server's scheduler (%(default)s); each further server's port is two higher",
    )
    parser.add_argument(
        "--executor-listen",
        type=_address,
        default="127.0.0.1:50052",
        metavar="HOST:PORT",
        help="of the first server's executor (%(default)s), likewise",
    )
    parser.add_argument(
        "--server",
        type=_address,
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a running server's scheduler; repeatable",
    )
    parser.add_argument("--smg-flags", default="", metavar="FLAGS", help="further flags of `smg launch`, in one string")


def run(args: argparse.Namespace) -> int:
    """Supervise everything until Ctrl-C or SIGTERM."""
    _check(args)
    if importlib.util.find_spec("smg") is None:
        raise CommandFailed("the gateway is not installed: `make run-gateway` or `pip install smg`")
    bind_to_parent()
    log_to_stderr("duet")
    stop = stop_on_signals()
    services = [] if args.server else [child for index in range(args.replicas) for child in _replica(args, index)]
    servers = args.server or [client_address(_shifted(args.listen, 2 * index)) for index in range(args.replicas)]
    gateway = gateway_child(args.http, servers, metrics=args.metrics, flags=shlex.split(args.smg_flags))

    def announce() -> None:
        example = f"curl http://{client_address(args.http)}/v1/models"
        print(f"\nReady at http://{args.http}/v1. Try this in another terminal:\n\n  {example}\n", flush=True)

    # Streams that drain come through the gateway.
    gateway = dataclasses.replace(gateway, stops_after=[service.name for service in services])
    supervisor = Supervisor([*services, gateway], on_ready=announce, hang_timeout_s=hang_timeout_s(args.rest))
    return 1 if supervisor.run(stop) else 0


def gateway_child(http: str, servers: Sequence[str], *, metrics: str | None = None, flags: Sequence[str] = ()) -> Child:
    """The gateway in front of `servers`, ready when it has found them all; `flags` are SMG's own."""
    host, _, port = http.rpartition(":")
    metrics_host, _, metrics_port = (metrics or _shifted(http, 1)).rpartition(":")
    command = [
        *(sys.executable, "-m", "duet.gateway_process", client_address(http), str(len(servers))),
        *("--host", host.strip("[]"), "--port", port),
        *("--prometheus-host", metrics_host.strip("[]"), "--prometheus-port", metrics_port),
        *("--worker-urls", *(f"grpc://{server}" for server in servers)),
        *_SMG_FLAGS,
        *flags,
    ]
    return Child("gateway", command)


def _check(args: argparse.Namespace) -> None:
    """Exits with status 2 where the arguments do not fit together."""
    if bool(args.server) == bool(args.model):
        args.usage_error("give either a model, to start servers, or --server, for running ones")
    if args.server and args.rest:
        args.usage_error(f"unrecognized arguments: {' '.join(args.rest)}")
    if args.replicas < 1:
        args.usage_error("--replicas must be at least 1")


def _replica(args: argparse.Namespace, index: int) -> list[Child]:
    flags = list(args.rest)
    if args.replicas > 1 and not any(flag.startswith("--num-threads") for flag in flags):
        num_cores = len(os.sched_getaffinity(0))
        flags += ["--num-threads", str(max(1, num_cores // args.replicas))]
    listen, executor_listen = _shifted(args.listen, 2 * index), _shifted(args.executor_listen, 2 * index)
    children = service_children(args.model, listen, executor_listen, flags)
    return [_renamed(child, f" {index + 1}") for child in children]


def _renamed(child: Child, suffix: str) -> Child:
    """The child with `suffix` after its name and those of its sisters."""
    return dataclasses.replace(
        child, name=child.name + suffix, stops_after=[name + suffix for name in child.stops_after]
    )


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HOST:PORT")
    return text


def _shifted(address: str, count: int) -> str:
    """The address whose port is `count` higher."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + count}"
