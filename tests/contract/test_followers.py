"""What the session hands on to the other ranks: all that rank 0 runs, directly before it, and nothing else."""

import contextlib
from collections.abc import AsyncIterator, Iterator

from executor_service.plan import Plan
from executor_service.runner.runner import StepOutput
from protos.duet.executor.v1 import executor_pb2 as pb
from tests.contract.session_harness import (
    Code,
    Executor,
    ScriptedRunner,
    break_second,
    column,
    refuse_second,
    running,
    until,
)


class Followers:
    """Writes what it is sent into the history of the runner."""

    def __init__(self, runner: ScriptedRunner) -> None:
        self.history = runner.history
        self.broken = False

    def send(self, message: bytes) -> None:
        if self.broken:
            raise BrokenPipeError("rank 1 is gone")
        plan = pb.RunSessionRequest.FromString(message).plan
        self.history.append(f"send plan {plan.step_id} of epoch {plan.epoch}" if message else "send reset")


@contextlib.asynccontextmanager
async def leading(runner: ScriptedRunner) -> AsyncIterator[tuple[Executor, Followers]]:
    """An executor whose other ranks are `Followers`."""
    followers = Followers(runner)
    async with running(runner, followers) as executor:
        yield executor, followers


async def test_each_job_is_sent_directly_before_it_runs_and_plans_as_they_came() -> None:
    async with leading(ScriptedRunner()) as (executor, _):
        core = await executor.connect().open()
        await core.plan(1)
        await core.plan(2, iterations=3)
        for _ in range(4):
            await core.result()
        await executor.connect().open()
        assert executor.runner.history == [
            "send reset", "reset", "send plan 1 of epoch 1", "plan 1", "send plan 2 of epoch 1", "plan 2",
            "send reset", "reset",
        ]  # fmt: skip


async def test_what_rank_0_skips_is_never_sent() -> None:
    async with leading(ScriptedRunner()) as (executor, _):
        runner = executor.runner
        runner.gate.clear()
        old = await executor.connect().open()
        for step_id in (1, 2, 3):
            await old.plan(step_id)
        await until(lambda: "plan 1" in runner.history)
        new = executor.connect()
        await new.info()
        await new.ask(2)
        assert (await old.end())[0] is Code.ABORTED
        runner.gate.set()
        assert (await new.read()).opened.epoch == 2
        assert runner.history == ["send reset", "reset", "send plan 1 of epoch 1", "plan 1", "send reset", "reset"]


async def test_a_plan_that_was_sent_runs_to_its_end_even_if_nobody_reads_the_rest() -> None:
    class Halting(ScriptedRunner):
        def execute(self, plan: Plan) -> Iterator[StepOutput]:
            for output in super().execute(plan):
                self.history.append(f"step {output.step_id}")
                yield output
                assert self.gate.wait(30)

    async with leading(Halting()) as (executor, _):
        runner = executor.runner
        old = await executor.connect().open()
        runner.before = lambda plan: runner.gate.clear()
        await old.plan(1, iterations=3, join_slots=column(0))
        assert (await old.result()).step_id == 1
        new = executor.connect()
        await new.info()
        await new.ask(2)
        assert (await old.end())[0] is Code.ABORTED
        runner.gate.set()
        assert (await new.read()).opened.epoch == 2
        assert runner.history[-5:] == ["step 1", "step 2", "step 3", "send reset", "reset"]


async def test_a_plan_that_the_runner_refuses_was_sent_and_the_next_epoch_opens() -> None:
    async with leading(ScriptedRunner(refuse_second)) as (executor, _):
        core = await executor.connect().open()
        await core.plan(1)
        await core.plan(2)
        assert (await core.end())[0] is Code.INVALID_ARGUMENT
        await executor.connect().open()
        assert executor.runner.history == [
            "send reset", "reset", "send plan 1 of epoch 1", "plan 1", "send plan 2 of epoch 1", "plan 2",
            "send reset", "reset",
        ]  # fmt: skip


async def test_a_runner_that_failed_sends_nothing_more() -> None:
    async with leading(ScriptedRunner(break_second)) as (executor, _):
        executor.runner.gate.clear()
        core = await executor.connect().open()
        for step_id in (1, 2, 3):
            await core.plan(step_id)
        executor.runner.gate.set()
        assert (await core.end())[0] is Code.INTERNAL
        assert await executor.serving is False
        assert executor.runner.history[-1] == "plan 2"


async def test_a_rank_that_cannot_be_reached_fails_the_executor() -> None:
    async with leading(ScriptedRunner()) as (executor, followers):
        core = await executor.connect().open()
        followers.broken = True
        await core.plan(1)
        code, message = await core.end()
        assert code is Code.INTERNAL
        assert "rank 1 is gone" in message
        assert await executor.serving is False
        assert executor.runner.history == ["send reset", "reset"]
