"""The core process: `python -m scheduler_service.core`, started by the scheduler service."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from scheduler_service.config import SchedulerConfig
from scheduler_service.core.engine import Engine
from servicekit import fault_points
from servicekit.lifeline import Heartbeat, bind_to_parent
from servicekit.logs import log_to_stderr
from servicekit.memory import keep_freed_memory
from servicekit.settings import parse

KEPT_BYTES = 128 << 20  # of freed memory


async def _main(config: SchedulerConfig, socket_path: str) -> None:
    heartbeat = Heartbeat()

    def begin_to_beat() -> None:
        fault_points.reach("core.listening")
        heartbeat.beat_in_loop()

    task = asyncio.create_task(Engine(config).run(socket_path, on_listening=begin_to_beat))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    bind_to_parent()
    settings = parse(SchedulerConfig, None, prog="python -m scheduler_service.core", description=__doc__ or "")
    log_to_stderr("core")
    fault_points.arm(os.environ.get(fault_points.VARIABLE))
    fault_points.reach("core.starting")
    keep_freed_memory(KEPT_BYTES)
    assert settings.core_socket is not None, "the scheduler service names the socket"
    Path(settings.core_socket).unlink(missing_ok=True)  # a core that was killed left it behind
    asyncio.run(_main(settings, settings.core_socket))
