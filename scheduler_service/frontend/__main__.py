"""`python -m scheduler_service.frontend`: one front end process, started by `python -m scheduler_service`."""

import asyncio
import os
import sys

from scheduler_service.config import SchedulerConfig
from scheduler_service.frontend.address import PortUnavailable
from scheduler_service.frontend.admin import UnusableSecret
from scheduler_service.frontend.server import serve
from scheduler_service.frontend.tokenizer import UnusableModel
from servicekit import fault_points, settings
from servicekit.lifeline import Heartbeat, bind_to_parent
from servicekit.logs import log_to_stderr
from servicekit.supervisor import EXIT_GAVE_UP


def main() -> None:
    """Run until SIGTERM; exits with EXIT_GAVE_UP where another start would not help."""
    bind_to_parent()
    log_to_stderr("frontend")
    fault_points.arm(os.environ.get(fault_points.VARIABLE))
    config = settings.parse(
        SchedulerConfig, None, prog="python -m scheduler_service.frontend", description="Front end of the scheduler."
    )
    try:
        asyncio.run(serve(config, Heartbeat().beat_in_loop))
    except (UnusableModel, UnusableSecret, PortUnavailable) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_GAVE_UP)


if __name__ == "__main__":
    main()
