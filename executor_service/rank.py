"""One rank: one process, one device. Rank 0 alone speaks gRPC; the others run what it sends them."""

import asyncio
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

from executor_service.config import ExecutorConfig
from executor_service.device import Followers
from executor_service.distributed.placement import Placement
from executor_service.runner.runner import Runner
from executor_service.server import ListenError, serve
from executor_service.weights.errors import ModelError
from servicekit import fault_points
from servicekit.lifeline import Heartbeat, bind_to, bind_to_parent, notify_ready
from servicekit.logs import log_to_stderr
from servicekit.settings import parse
from servicekit.supervisor import EXIT_GAVE_UP

log = logging.getLogger(__name__)


def main() -> int:
    """Load the model and run it until SIGTERM, or until rank 0 ends; returns the exit status."""
    bind_to_parent()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started this rank, and may be killed
        bind_to(os.getppid())
    config = parse(ExecutorConfig, None, prog="python -m executor_service.rank", description="One rank of an executor.")
    placement = Placement.read(os.environ)
    log_to_stderr(f"rank {placement.rank}")
    fault_points.arm(os.environ.get(fault_points.VARIABLE))
    fault_points.reach("executor.starting", placement.rank)
    # torch takes seconds to import: only now, when this process can no longer outlive its supervisor.
    from executor_service.runner.build import build_runner

    # Only one thread may ever compute: each that does gets OpenMP workers of its own, and with more of them than
    # cores they stop spinning at barriers, which makes a decode step half as slow again.
    with ThreadPoolExecutor(1, "device") as device_thread:
        try:
            runner = device_thread.submit(build_runner, config, placement).result()
        except ModelError as error:
            log.error("%s", error)
            return EXIT_GAVE_UP
        if placement.size == 1:
            return asyncio.run(_serve(runner, device_thread, config.listen))
        if placement.rank == 0:
            return _lead(runner, device_thread, config.listen, placement)
        return _follow(runner, device_thread, placement)


async def _serve(
    runner: Runner, device_thread: ThreadPoolExecutor, address: str, followers: Followers | None = None
) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    heartbeat = Heartbeat()
    try:
        is_sound = await serve(runner, device_thread, address, stop, lambda _: heartbeat.beat_in_loop(), followers)
    except ListenError as error:  # the port may be free at the next start
        log.error("%s", error)
        return 1
    return 0 if is_sound else 1


def _lead(runner: Runner, device_thread: ThreadPoolExecutor, address: str, placement: Placement) -> int:
    from executor_service.distributed.plan_channel import open_sender

    sender = device_thread.submit(open_sender, placement).result()
    status = asyncio.run(_serve(runner, device_thread, address, sender))
    if status == 0:  # otherwise this rank's end tells the others more
        sender.close()
    return status


def _follow(runner: Runner, device_thread: ThreadPoolExecutor, placement: Placement) -> int:
    from executor_service.distributed.follower import follow
    from executor_service.distributed.plan_channel import open_receiver

    receiver = device_thread.submit(open_receiver, placement).result()
    for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 gets it too, and needs this one until it has drained
        signal.signal(number, signal.SIG_IGN)
    notify_ready()
    log.info("following rank 0")
    try:
        follow(runner, device_thread, receiver.receive)
    except Exception:
        log.exception("rank %d failed", placement.rank)
        os._exit(1)  # at once, since the device thread may be stuck
    return 0


if __name__ == "__main__":
    sys.exit(main())
