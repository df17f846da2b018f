"""Arms the fault points of processes that a test starts; servicekit/fault_points.py says what the files mean."""

import dataclasses
import os
import time
from pathlib import Path

from servicekit.fault_points import POINTS, VARIABLE

PATIENCE_S = 60.0  # for what happens soon; only a test that fails waits so long


@dataclasses.dataclass(frozen=True)
class FaultPoints:
    """A directory that processes look into which are started with `environment`."""

    directory: Path  # exists

    @property
    def environment(self) -> dict[str, str]:
        return {VARIABLE: str(self.directory)}

    def arm(self, name: str, fault: str) -> None:
        """Let `fault`, such as "kill after 3", happen at a point; whatever was armed there is replaced."""
        assert name in POINTS, name
        self.disarm(name)
        written = self.directory / f"{name}.new"
        written.write_text(fault)
        os.replace(written, self.directory / name)

    def disarm(self, name: str) -> None:
        for file in (name, f"{name}.count"):
            (self.directory / file).unlink(missing_ok=True)

    def is_armed(self, name: str) -> bool:
        """False once it has happened, unless it is to happen always."""
        return (self.directory / name).exists()

    def wait_for(self, name: str) -> None:
        """Return once it has happened."""
        end = time.monotonic() + PATIENCE_S
        while self.is_armed(name):
            assert time.monotonic() < end, f"{name} was never reached"
            time.sleep(0.005)
