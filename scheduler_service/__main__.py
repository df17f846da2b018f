"""The scheduler service: keeps the core and the front ends alive."""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path

from scheduler_service.config import SchedulerConfig
from scheduler_service.frontend.address import PortUnavailable, check_address
from servicekit.child_process import Child
from servicekit.settings import parse, to_argv
from servicekit.supervisor import EXIT_GAVE_UP, supervise


def main() -> int:
    """Run until a signal; returns the exit status."""
    config = parse(SchedulerConfig, None, prog="python -m scheduler_service", description=__doc__ or "")
    num_frontends = config.num_frontends or default_num_frontends(config.listen)
    if num_frontends > 1:  # they share the port, and would share it with a stranger's too
        try:
            check_address(config.listen)
        except PortUnavailable as error:
            sys.stderr.write(f"{error}\n")
            return EXIT_GAVE_UP
    with tempfile.TemporaryDirectory(prefix="duet-") as directory:
        core_socket = config.core_socket or str(Path(directory) / "core.sock")
        config = dataclasses.replace(config, core_socket=core_socket, num_frontends=num_frontends)
        names = ["frontend"] if num_frontends == 1 else [f"frontend {number}" for number in range(1, num_frontends + 1)]
        frontends = [Child(name, _argv("frontend", config), drain_s=config.drain_s) for name in names]
        core = Child("core", _argv("core", config), stops_after=names)
        return supervise("scheduler", [core, *frontends], hang_timeout_s=config.hang_timeout_s)


def default_num_frontends(listen: str) -> int:
    """One for every four cores that the process may use, four at most; one where the system picks the port."""
    if listen.endswith(":0"):
        return 1
    return min(max(len(os.sched_getaffinity(0)) // 4, 1), 4)


def _argv(module: str, config: SchedulerConfig) -> list[str]:
    return [sys.executable, "-m", f"scheduler_service.{module}", *to_argv(config)]


if __name__ == "__main__":
    sys.exit(main())
