"""A rank as a process, all of it but the runner: `python -m tests.contract.scripted_rank WIPE_TIMEOUT_S FLAG...`."""

import dataclasses
import sys
import types
from collections.abc import Iterator

import executor_service.device
from executor_service import rank
from executor_service.plan import Plan
from executor_service.runner.runner import Pending, StepOutput
from tests.contract.session_harness import ScriptedRunner


@dataclasses.dataclass
class Launched:
    """A pending output, for which another thread waits than that which launched it."""

    output: StepOutput
    step_id: int
    partial: bool

    def wait(self) -> StepOutput:
        return self.output


class LaunchingRunner:
    """Has the outputs of odd steps at once, and those of even steps later."""

    def __init__(self) -> None:
        self._script = ScriptedRunner()
        self.info, self.reset = self._script.info, self._script.reset

    def execute(self, plan: Plan) -> Iterator[Pending]:
        for output in self._script.execute(plan):
            yield output if output.step_id % 2 else Launched(output, output.step_id, output.partial)


if __name__ == "__main__":
    executor_service.device.WIPE_TIMEOUT_S = float(sys.argv.pop(1))
    # In the place of the module that builds real runners, which imports torch: a second less at each start.
    build: types.ModuleType = types.ModuleType("build")
    build.build_runner = lambda config, placement: LaunchingRunner()  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["executor_service.runner.build"] = build
    sys.exit(rank.main())
