"""The scheduler service: keeps the core and the front end alive."""

import dataclasses
import sys
import tempfile
from pathlib import Path

from scheduler_service.config import SchedulerConfig
from servicekit.settings import parse, to_argv
from servicekit.supervisor import Child, supervise


def main() -> int:
    """Run until a signal; returns the exit status."""
    config = parse(SchedulerConfig, None, prog="python -m scheduler_service", description=__doc__ or "")
    with tempfile.TemporaryDirectory(prefix="duet-") as directory:
        config = dataclasses.replace(config, core_socket=config.core_socket or str(Path(directory) / "core.sock"))
        children = [
            Child(name, [sys.executable, "-m", f"scheduler_service.{name}", *to_argv(config)])
            for name in ("core", "frontend")
        ]
        return supervise("scheduler", children)


if __name__ == "__main__":
    sys.exit(main())
