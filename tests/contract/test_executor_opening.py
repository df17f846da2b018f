"""RunSession through a real channel: who gets an epoch, and how one core takes over from another."""

import asyncio
import time

import grpc
import pytest

from executor_service.session import MAX_INFLIGHT_PLANS, PROTOCOL_VERSION
from protos.duet.executor.v1 import executor_pb2 as pb
from tests.contract.session_harness import (
    Code,
    Executor,
    until,
)

# --- opening -----------------------------------------------------------------------------------------------------


async def test_executor_speaks_first_and_describes_itself(executor: Executor) -> None:
    info = await executor.connect().info()
    assert info.boot_id
    info.boot_id = ""
    assert info == pb.ExecutorInfo(
        protocol_version=3, architecture="TinyForCausalLM", model_digest="model", weights_digest="weights",
        dtype="float32", device="a script", vocab_size=100, max_model_len=32, block_size=4, num_blocks=8, num_slots=4,
        max_tokens_per_step=16, graph_batch_sizes=[1, 2], tensor_parallel_size=1, max_inflight_plans=MAX_INFLIGHT_PLANS,
    )  # fmt: skip


async def test_opening_wipes_the_slots_and_is_seen_by_the_next_core(executor: Executor) -> None:
    await executor.connect().open()
    assert executor.runner.history == ["reset"]
    info = await executor.connect().info()
    assert (info.last_epoch, info.session_alive) == (1, True)


@pytest.mark.parametrize("epoch", [0, 1, 3, 2**63])
async def test_an_epoch_that_does_not_follow_is_aborted_and_disturbs_nobody(executor: Executor, epoch: int) -> None:
    holder = await executor.connect().open()
    late = executor.connect()
    await late.info()
    await late.ask(epoch)
    assert (await late.end())[0] is Code.ABORTED
    await holder.plan(1)
    assert (await holder.result()).step_id == 1


async def test_of_two_cores_that_ask_for_one_epoch_exactly_one_gets_it(executor: Executor) -> None:
    cores = [executor.connect() for _ in range(2)]
    for core in cores:
        await core.info()
    await asyncio.gather(*(core.ask(1) for core in cores))
    answers = await asyncio.gather(*(core.read() for core in cores), return_exceptions=True)
    assert sum(isinstance(answer, pb.RunSessionResponse) for answer in answers) == 1
    (loser,) = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert loser.code() is Code.ABORTED


@pytest.mark.parametrize(
    ("difference", "word"),
    [({"model": "other"}, "model_digest"), ({"weights": "other"}, "weights_digest"), ({"version": 9}, "version")],
)
async def test_a_core_that_does_not_match_is_refused_and_does_not_fence(
    executor: Executor, difference: dict[str, str], word: str
) -> None:
    holder = await executor.connect().open()
    other = executor.connect()
    await other.info()
    await other.ask(2, **difference)  # pyright: ignore[reportArgumentType]
    code, message = await other.end()
    assert code is Code.FAILED_PRECONDITION
    assert word in message
    await holder.plan(1)
    assert (await holder.result()).step_id == 1


@pytest.mark.parametrize("version", [PROTOCOL_VERSION - 1, PROTOCOL_VERSION, PROTOCOL_VERSION + 1])
async def test_a_core_one_version_older_or_newer_is_served(executor: Executor, version: int) -> None:
    core = executor.connect()
    await core.info()
    await core.ask(1, version=version)
    assert (await core.read()).opened.epoch == 1
    core.epoch = 1
    await core.plan(1)
    assert (await core.result()).step_id == 1


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION - 2, PROTOCOL_VERSION + 2])
async def test_a_core_further_away_than_one_version_is_refused(executor: Executor, version: int) -> None:
    core = executor.connect()
    await core.info()
    await core.ask(1, version=version)
    code, message = await core.end()
    assert code is Code.FAILED_PRECONDITION
    assert f"protocol version {version}" in message
    assert executor.runner.history == []


async def test_equal_weights_digest_is_accepted(executor: Executor) -> None:
    core = executor.connect()
    await core.info()
    await core.ask(1, weights="weights")
    assert (await core.read()).opened.epoch == 1


async def test_a_session_opens_once(executor: Executor) -> None:
    core = await executor.connect().open()
    await core.ask(2)
    assert (await core.end())[0] is Code.FAILED_PRECONDITION


# --- fencing and loss --------------------------------------------------------------------------------------------


async def test_a_later_epoch_fences_the_older_one_whose_queued_plans_never_run(executor: Executor) -> None:
    runner = executor.runner
    runner.gate.clear()
    old = await executor.connect().open()
    for step_id in (1, 2, 3):
        await old.plan(step_id)
    await until(lambda: "plan 1" in runner.history)
    new = executor.connect()
    await new.info()
    await new.ask(2)
    assert await old.end() == (Code.ABORTED, "fenced by epoch 2")
    opened = asyncio.create_task(new.read())
    await asyncio.sleep(0.05)
    assert not opened.done()  # the device still runs the old epoch's first plan
    runner.gate.set()
    assert (await opened).opened.epoch == 2
    new.epoch = 2
    await new.plan(1)
    assert (await new.result()).epoch == 2
    assert runner.history == ["reset", "plan 1", "reset", "plan 1"]


async def test_no_plan_is_taken_between_the_opening_and_its_confirmation(executor: Executor) -> None:
    runner = executor.runner
    runner.gate.clear()
    old = await executor.connect().open()
    await old.plan(1)
    await until(lambda: "plan 1" in runner.history)
    new = executor.connect()
    await new.info()
    await new.ask(2)
    new.epoch = 2
    await new.plan(1)
    assert (await new.end())[0] is Code.FAILED_PRECONDITION
    runner.gate.set()
    await executor.connect().open()
    assert runner.history == ["reset", "plan 1", "reset"]  # the refused session's wiping was dropped with it


@pytest.mark.parametrize("how", ["cancel", "close", "vanish"])
async def test_a_core_that_went_away_loses_its_queued_plans_and_the_next_one_opens(
    executor: Executor, how: str
) -> None:
    runner = executor.runner
    runner.gate.clear()
    channel = grpc.aio.insecure_channel(executor.address, options=[("grpc.use_local_subchannel_pool", 1)])
    old = await executor.connect(channel).open()
    await old.plan(1)
    await old.plan(2)
    await until(lambda: "plan 1" in runner.history)
    match how:
        case "cancel":
            old.call.cancel()
        case "close":
            await old.call.done_writing()
        case "vanish":
            await channel.close()
    deadline = time.monotonic() + 30
    while (await executor.connect().info()).session_alive:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    runner.gate.set()
    new = await executor.connect().open()
    assert new.epoch == 2
    await new.plan(1)
    assert (await new.result()).step_id == 1
    assert runner.history == ["reset", "plan 1", "reset", "plan 1"]
    await channel.close()
