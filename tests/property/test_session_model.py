"""The session as a model check: random lives of everybody, with an executor that sees every wrong KV row.

Each of the bugs that the rules of the session are there for is put back in, one by one, and must be noticed; those
that deaths and departures are prone to in test_recovery_model.py, those of constraints in test_constrained_session.py.
`pytest tests/property/test_session_model.py -s --session-runs 10000` leads more lives, and says what was in them.
"""

from collections import Counter

import pytest

from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.core import settlement
from scheduler_service.core.epoch import Epoch
from scheduler_service.core.prefix_cache import PrefixCache, extend_digests
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.scheduler import Scheduler
from scheduler_service.core.step_plan import Chunk, StepPlan, StepRecord, StepResult
from scheduler_service.errors import InternalError
from tests.property.fake_executor import Result
from tests.property.noticing import assert_noticed
from tests.property.session_driver import SessionRun

EVENTS = (
    "appended blocks",
    "clients that left",
    "clients that were cut off",
    "cores killed with requests",
    "culprits convicted",
    "damaged tokens",
    "decode steps of constrained and other rows",
    "ended by DeadlineExceeded",
    "ended by DuplicateRequest",
    "ended by ExecutorUnavailable",
    "ended by FINISH_REASON_CANCELLED",
    "ended by FINISH_REASON_LENGTH",
    "ended by FINISH_REASON_STOP",
    "ended by InternalError",
    "ended by InvalidRequest",
    "ended by dropped",
    "ended by gone",
    "ended by refused",
    "executors killed",
    "executors that died of a request",
    "front ends killed",
    "hits",
    "innocents convicted by chance",
    "late stops",
    "late tokens",
    "losses in order",
    "losses with plans in flight",
    "masks of ended requests",
    "masks of preempted requests",
    "plans held back for masks",
    "plans of several steps",
    "preemptions",
    "resubmissions",
    "resubmissions that were merged",
    "resubmissions that replaced a shorter one",
    "resumed constrained sequences",
    "resumed sequences",
    "resumptions of ended requests",
    "resumptions of living requests",
    "resumptions that generate anew",
    "texts that were complete",
    "tokens of detached",
    "tokens of preempted",
    "tokens under a mask",
    "trials",
)


@pytest.mark.timeout(3600)
def test_every_stream_gets_the_tokens_of_an_undisturbed_run(num_session_runs: int):
    counts: Counter[str] = Counter()
    for seed in range(num_session_runs):
        try:
            counts += SessionRun(seed).run()
        except (AssertionError, KeyError, IndexError) as error:
            raise AssertionError(f"run {seed}: {error}") from error
    print("\n" + "\n".join(f"{count:8} {event}" for event, count in sorted(counts.items())))
    for event in EVENTS:
        assert counts[event] > 0, f"no run had: {event}"


def test_notices_a_block_published_for_a_request_that_no_longer_holds_it(monkeypatch: pytest.MonkeyPatch):
    def publish_whatever_is_there(epoch: Epoch, request: Request, slot: int) -> None:
        extend_digests(request.block_digests, request.token_ids, epoch.blocks.block_size, request.cache_salt)
        last = (len(request.token_ids) - 1) // epoch.blocks.block_size
        epoch.blocks.publish(slot, request.block_digests, request.token_ids, last - 1, last)

    monkeypatch.setattr(settlement, "_publish_last_block", publish_whatever_is_there)
    assert_noticed()


def test_notices_tokens_given_to_whoever_holds_the_slot_now(monkeypatch: pytest.MonkeyPatch):
    original = settlement.apply_result

    def apply_to_present_holders(pool: RequestPool, result: StepResult) -> None:
        epoch = pool.epoch
        assert epoch is not None
        running = dict(epoch.running)

        def present_holders(record: StepRecord, result: StepResult) -> list[Request]:
            holders = settlement._holders(record) | running
            return [holders[slot] for slot in result.slots.tolist()]

        with monkeypatch.context() as patch:
            patch.setattr(settlement, "_requests_of", present_holders)
            original(pool, result)

    monkeypatch.setattr(settlement, "apply_result", apply_to_present_holders)
    assert_noticed()


def test_notices_flights_that_end_by_counting_tokens(monkeypatch: pytest.MonkeyPatch):
    """A slot that is done samples nothing, so the tokens that a plan promised need not all come."""
    original = settlement.apply_result

    def settle_by_tokens(pool: RequestPool, result: StepResult) -> None:
        epoch = pool.epoch
        assert epoch is not None
        record = epoch.records[0]
        original(pool, result)
        if not result.partial and len(result.slots) < len(record.decode_slots):
            epoch.num_plans_in_flight += record.ends_plan  # it waits for the rest

    monkeypatch.setattr(settlement, "apply_result", settle_by_tokens)
    assert_noticed()


def test_notices_a_request_admitted_again_with_a_plan_in_flight(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Epoch, "is_in_flight", lambda epoch, request: False)
    assert_noticed()


def test_notices_a_slot_given_out_before_its_release_was_sent(monkeypatch: pytest.MonkeyPatch):
    late: dict[Epoch, list[int]] = {}

    def release_one_plan_late(epoch: Epoch) -> list[int]:
        due, late[epoch] = late.get(epoch, []), epoch.released_slots
        epoch.released_slots = []
        return due

    monkeypatch.setattr(Epoch, "take_released_slots", release_one_plan_late)
    assert_noticed()


def test_notices_hits_upon_blocks_of_the_same_plan(monkeypatch: pytest.MonkeyPatch):
    original = Scheduler._add_chunk

    def publish_at_once(self: Scheduler, epoch: Epoch, plan: StepPlan, request: Request, budget: int) -> int:
        count = original(self, epoch, plan, request, budget)
        chunk: Chunk = plan.chunks[-1]
        size = epoch.blocks.block_size
        first, last = chunk.start // size, (chunk.start + chunk.count) // size
        epoch.blocks.publish(chunk.slot, request.block_digests, request.token_ids, first, last)
        return count

    monkeypatch.setattr(Scheduler, "_add_chunk", publish_at_once)
    monkeypatch.setattr(Scheduler, "_awaits_twin", lambda *_: False)
    assert_noticed()


def test_notices_that_tokens_of_a_preempted_request_are_dropped(monkeypatch: pytest.MonkeyPatch):
    original = settlement._accept_token

    def accept_if_running(pool: RequestPool, epoch: Epoch, request: Request, slot: int, token: int, reason: int):
        if request.state is not RequestState.WAITING:
            original(pool, epoch, request, slot, token, reason)

    monkeypatch.setattr(settlement, "_accept_token", accept_if_running)
    assert_noticed()


def test_notices_a_token_sent_twice(monkeypatch: pytest.MonkeyPatch):
    original = settlement._accept_token

    def accept(pool: RequestPool, epoch: Epoch, request: Request, slot: int, token: int, reason: int):
        if request.state is RequestState.WAITING:
            request.outbox.streams.append(request.stream)
            request.outbox.token_ids.append(token)
        original(pool, epoch, request, slot, token, reason)

    monkeypatch.setattr(settlement, "_accept_token", accept)
    assert_noticed()


class CredulousRun(SessionRun):
    """One whose core takes a result of the lost executor for the first that is due from the new one."""

    stale: Result | None = None

    def end_executor(self) -> None:
        """Keep what was on its way."""
        if self.executor is not None and self.executor.results:
            self.stale = self.executor.results[-1]
        super().end_executor()

    def deliver(self) -> None:
        """Deliver the stale result in the place of the new one."""
        assert self.executor is not None
        due = self.executor.take_result()
        if self.stale is not None:
            message = pb.StepResult.FromString(self.stale.message)
            now_due = pb.StepResult.FromString(due.message)
            message.step_id, message.partial = now_due.step_id, now_due.partial
            due, self.stale = Result(message.SerializeToString(), due.rows, due.has_failures), None
        self.apply(due)


def test_notices_a_result_of_a_lost_executor():
    assert_noticed(CredulousRun)


def test_notices_that_preempted_requests_keep_their_flights_over_a_loss(monkeypatch: pytest.MonkeyPatch):
    """The new epoch's step ids begin at 1 again: a flight of the old one would not end for long, or ever."""
    original = RequestPool.end_epoch

    def forget_to_forget(pool: RequestPool, *, in_order: bool) -> None:
        flights = {request: request.in_flight_until for request in pool.waiting}
        original(pool, in_order=in_order)
        for request, until in flights.items():
            request.in_flight_until = until

    monkeypatch.setattr(RequestPool, "end_epoch", forget_to_forget)
    assert_noticed()


def test_notices_a_failed_step_whose_blocks_stay_in_the_index(monkeypatch: pytest.MonkeyPatch):
    def fail_alone(pool: RequestPool, epoch: Epoch, request: Request, message: str) -> None:
        if request.state is not RequestState.FINISHED:
            pool.fail(request, InternalError(message))

    monkeypatch.setattr(settlement, "_fail_slot", fail_alone)
    assert_noticed()


def test_notices_tokens_that_were_computed_from_the_blocks_of_a_failed_step(monkeypatch: pytest.MonkeyPatch):
    original = settlement._fail_slot

    def fail_but_trust(pool: RequestPool, epoch: Epoch, request: Request, message: str) -> None:
        original(pool, epoch, request, message)
        for other in pool.requests.values():
            other.spoiled = False

    monkeypatch.setattr(settlement, "_fail_slot", fail_but_trust)
    assert_noticed()


def test_notices_what_was_built_upon_a_failed_step_by_one_who_is_gone(monkeypatch: pytest.MonkeyPatch):
    def only_that_prefix(cache: PrefixCache, digest: bytes, index: int) -> list[int]:
        block = cache.holder(digest)
        return [] if block is None else [block]

    monkeypatch.setattr(PrefixCache, "going_on_from", only_that_prefix)
    assert_noticed()


def test_notices_a_plan_of_one_step_too_many(monkeypatch: pytest.MonkeyPatch):
    original = Scheduler._iterations

    def one_more(self: Scheduler, epoch: Epoch) -> int:
        iterations = original(self, epoch)
        return iterations + 1 if iterations > 1 else iterations

    monkeypatch.setattr(Scheduler, "_iterations", one_more)
    assert_noticed()


def test_notices_that_the_oldest_request_is_preempted(monkeypatch: pytest.MonkeyPatch):
    original = RequestPool.preempt

    def preempt_the_oldest(pool: RequestPool, request: Request) -> None:
        assert pool.epoch is not None
        original(pool, min(pool.epoch.running.values(), key=lambda other: other.arrival))

    monkeypatch.setattr(RequestPool, "preempt", preempt_the_oldest)
    assert_noticed()
