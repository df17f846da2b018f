"""`python -m scheduler_service.frontend`: one front end process, started by `python -m scheduler_service`."""

import asyncio
import sys

from scheduler_service.config import SchedulerConfig
from scheduler_service.frontend.address import PortUnavailable
from scheduler_service.frontend.server import serve
from scheduler_service.frontend.tokenizer import UnusableModel
from servicekit import settings, supervisor
from servicekit.logs import log_to_stderr


def main() -> None:
    """Run until SIGTERM; exits with EXIT_GAVE_UP where another start would not help."""
    supervisor.bind_to_parent()
    log_to_stderr("frontend")
    config = settings.parse(
        SchedulerConfig, None, prog="python -m scheduler_service.frontend", description="Front end of the scheduler."
    )
    try:
        asyncio.run(serve(config, supervisor.notify_ready))
    except (UnusableModel, PortUnavailable) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(supervisor.EXIT_GAVE_UP)


if __name__ == "__main__":
    main()
