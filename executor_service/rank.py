"""One rank: one process, one device. Rank 0 alone speaks gRPC."""

import asyncio
import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

from executor_service.config import ExecutorConfig
from executor_service.runner.runner import Runner
from executor_service.server import ListenError, serve
from executor_service.weights.errors import ModelError
from servicekit.logs import log_to_stderr
from servicekit.settings import parse
from servicekit.supervisor import EXIT_GAVE_UP, bind_to_parent, notify_ready

log = logging.getLogger(__name__)


def main() -> int:
    """Load the model and serve it until SIGTERM; returns the exit status."""
    bind_to_parent()
    config = parse(ExecutorConfig, None, prog="python -m executor_service.rank", description="One rank of an executor.")
    log_to_stderr("rank 0")
    # torch takes seconds to import: only now, when this process can no longer outlive its supervisor.
    from executor_service.runner.build import build_runner

    # Only one thread may ever compute: each that does gets OpenMP workers of its own, and with more of them than
    # cores they stop spinning at barriers, which makes a decode step half as slow again.
    with ThreadPoolExecutor(1, "device") as device_thread:
        try:
            runner = device_thread.submit(build_runner, config).result()
        except ModelError as error:
            log.error("%s", error)
            return EXIT_GAVE_UP
        return asyncio.run(_serve(runner, device_thread, config.listen))


async def _serve(runner: Runner, device_thread: ThreadPoolExecutor, address: str) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        is_sound = await serve(runner, device_thread, address, stop, on_listening=lambda port: notify_ready())
    except ListenError as error:  # the port may be free at the next start
        log.error("%s", error)
        return 1
    return 0 if is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
