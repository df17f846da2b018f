"""One random life of the core against the fake executor."""

import random
from array import array
from collections import Counter

from executor_service.plan import Limits
from protos.duet.executor.v1 import executor_pb2
from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.core import masks, settlement
from scheduler_service.core.epoch import ExecutorLimits
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.scheduler import Policy, Scheduler
from scheduler_service.core.step_plan import decode_result
from scheduler_service.core.waiting_queue import ORDERS
from scheduler_service.errors import DuplicateRequest, QueueFull
from scheduler_service.ipc import Sampling
from tests.property.fake_executor import FakeExecutor, Result
from tests.property.fake_model import CONSTRAINED_TOP_K, as_column, mask_for
from tests.property.session_clients import Clients

VOCAB_SIZE = 5
MAX_MODEL_LEN = 30
MAX_ACTIONS = 5_000  # of one run: far more than any needs


class SessionRun:
    """Everything follows from the seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.constrained = rng.choice([0.0, 0.3, 1.0])  # of the requests
        self.mask_jobs: list[tuple[Request, tuple[int, ...]]] = []  # what was generated when a mask was asked for
        self.counts: Counter[str] = Counter()
        self.now = 0.0
        self.block_size = rng.randint(2, 4)
        self.failure_rate = rng.choice([0.0, 0.0, 0.0, 0.02, 0.2])
        self.device_time_ns = rng.choice([0, 1_000_000, 1_000_000, 5_000_000])
        self.eager = rng.random() < 0.5  # plans go out as soon as they can, as in the engine
        self.disturbance = rng.choice([0.0, 0.02, 0.1])  # cancellations, losses
        self.pool = RequestPool(ORDERS[rng.choice(list(ORDERS))], max_waiting=rng.choice([3, 100, 100, 100]))
        self.policy = Policy(rng.randint(1, 4), rng.choice([0.0, 0.005, 0.4]))
        self.scheduler = Scheduler(self.pool, self.policy)
        self.executor: FakeExecutor | None = None
        self.num_epochs = 0
        self.errors_in_epoch = False
        self.injected_seeds: set[int] = set()
        self.clients = Clients(VOCAB_SIZE)
        self.num_to_submit = rng.randint(3, 12)
        self.prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(14)] for _ in range(rng.randint(1, 2))]
        self.longest = 0  # tokens of the longest request
        self.capacity = 0  # tokens of the last executor

    def run(self) -> Counter[str]:
        """Live, drain, and check that nothing is left behind."""
        self.connect()
        for _ in range(MAX_ACTIONS):
            self.act()
            if not self.num_to_submit and not self.pool.requests and self.executor is not None:
                break
        assert not self.pool.requests, "a request starved"
        self.finish_flights()
        self.check_nothing_left()
        self.counts["runs"] += 1
        self.counts["preemptions"] += self.pool.counters.preemptions
        return self.counts

    def act(self) -> None:
        """One random event."""
        rng = self.rng
        self.now += rng.choice([0.0, 0.001, 0.003])
        if rng.random() < self.disturbance:
            rng.choice([self.cancel, self.cancel, self.abandon, self.expire, self.lose, self.drop_front_end])()
        if self.executor is None:
            if rng.random() < 0.3:
                self.connect()
        else:
            event = rng.random()
            if event < 0.4 and self.executor.queued:
                self.executor.run_plan()
            elif event < 0.8 and self.executor.results:
                self.deliver()
            elif not self.eager:
                self.pump(most=rng.choice([1, 100]))
        self.mask_jobs += [(request, _generated(request)) for request in self.pool.unmasked]
        self.pool.unmasked.clear()
        if self.mask_jobs and rng.random() < 0.4:
            self.give_masks()
        if self.num_to_submit and rng.random() < 0.2:
            self.submit()
        if self.eager or not self.is_busy():
            self.pump(most=100)
            is_idle = self.executor is None or not self.pool.requests or self.mask_jobs or self.pool.unmasked
            assert self.is_busy() or is_idle, "requests live and nothing runs"

    def is_busy(self) -> bool:
        return self.executor is not None and self.executor.num_plans_in_flight > 0

    # --- front end -----------------------------------------------------------------------------------------------

    def submit(self) -> None:
        rng = self.rng
        self.num_to_submit -= 1
        shared = rng.choice(self.prompts)[: rng.randint(0, 14)]
        prompt = shared + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0 if shared else 1, 4))]
        total = min(len(prompt) + rng.randint(1, 10), self.capacity)  # the front end refuses what is longer
        stops = rng.choice([[], [], [rng.randrange(VOCAB_SIZE)]])
        stream = len(self.clients.all)
        is_constrained = rng.random() < self.constrained
        request = Request(
            request_id=f"request {stream}",
            outbox=rng.choice(self.clients.outboxes),
            stream=stream,
            token_ids=array("i", prompt),
            num_prompt_tokens=len(prompt),
            max_total_tokens=total,
            sampling=Sampling(seed=stream, top_k=CONSTRAINED_TOP_K if is_constrained else 0),
            stop_token_ids=stops,
            priority=rng.randint(-1, 1),
            cache_salt=rng.choice(["", "", "pepper"]),
            arrival_time=self.now,
            deadline=self.now + rng.choice([0.05, 0.5]) if rng.random() < self.disturbance else None,
            constraint="a grammar" if is_constrained else None,
        )
        client = self.clients.add(request)
        try:
            self.pool.submit(request)
        except QueueFull:
            client.end = "refused"
            return
        self.longest = max(self.longest, total)
        try:
            self.pool.submit(request)
        except DuplicateRequest:
            return
        raise AssertionError("a request id was taken twice")

    def give_masks(self) -> None:
        """The grammar worker answers some of its jobs; now and then a grammar turns out to be wrong."""
        self.rng.shuffle(self.mask_jobs)
        for _ in range(self.rng.randint(1, len(self.mask_jobs))):
            request, generated = self.mask_jobs.pop()
            if request.state is RequestState.FINISHED:
                self.counts["masks of ended requests"] += 1
                continue
            assert generated == _generated(request), "a token came while its mask was computed"
            self.counts["masks of preempted requests"] += request.state is RequestState.WAITING
            mask = mask_for(request.sampling.seed, generated, VOCAB_SIZE)
            if self.rng.random() < self.disturbance / 10:
                self.clients.all[request.stream].is_refused = True
                masks.refuse(self.pool, request, "too complex")
            else:
                masks.give_mask(self.pool, request, as_column(mask))
                self.counts["texts that were complete"] += mask == 0
        self.flush()

    def cancel(self) -> None:
        if self.pool.requests:
            self.pool.finish(self.rng.choice(list(self.pool.requests.values())), pb.FINISH_REASON_CANCELLED)
            self.flush()

    def abandon(self) -> None:
        if self.pool.requests:
            request = self.rng.choice(list(self.pool.requests.values()))
            self.pool.drop(request)
            self.clients.all[request.stream].end = "dropped"

    def drop_front_end(self) -> None:
        outbox = self.rng.choice(self.clients.outboxes)
        if self.rng.random() < 0.2:
            self.pool.drop_all_of(outbox)
            for client in self.clients.all:
                if client.request.outbox is outbox and client.end is None:
                    client.end = "dropped"

    def expire(self) -> None:
        self.pool.expire(self.now)
        if self.executor is None:
            self.pool.fail_older_than(self.now - 0.05, "no executor")
        self.flush()

    def flush(self) -> list[tuple[int, int]]:
        """The clients read; returns the new tokens as (stream, token)."""
        return self.clients.read(self.now, self.injected_seeds)

    # --- executor ------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """An empty executor, now and then of another size."""
        rng, size = self.rng, self.block_size
        smallest = -(-max(self.longest, 20) // size) if rng.random() < 0.9 else -(-20 // size)
        num_blocks, num_slots = smallest + rng.choice([0, 1, 2, 4, 20]), rng.randint(1, 6)
        budget, max_inflight = rng.choice([1, 2, 4, 8, 16, 40]), rng.randint(1, 6)
        self.num_epochs += 1
        self.errors_in_epoch = False
        self.capacity = min(MAX_MODEL_LEN, num_blocks * size)
        limits = Limits(num_slots, num_blocks, size, VOCAB_SIZE, MAX_MODEL_LEN, budget)
        self.executor = FakeExecutor(limits, min(max_inflight, self.policy.max_inflight_steps), self.num_epochs, rng)
        self.executor.failure_rate, self.executor.device_time_ns = self.failure_rate, self.device_time_ns
        self.pool.begin_epoch(ExecutorLimits(size, num_blocks, num_slots, budget, MAX_MODEL_LEN, max_inflight))
        assert not self.flush()

    def lose(self) -> None:
        """The executor dies, with all that it holds and all that is on its way."""
        if self.executor is None:
            return
        self.counts["losses"] += 1
        self.counts["losses with plans in flight"] += self.executor.num_plans_in_flight > 0
        self.counts.update(self.executor.counts)
        self.injected_seeds |= self.executor.injected_seeds
        self.executor = None
        self.pool.end_epoch()
        assert not self.flush()

    def pump(self, most: int) -> None:
        if self.executor is None:
            assert self.scheduler.schedule(self.now) is None
            return
        assert self.pool.epoch is not None
        self.counts["plans held back for masks"] += self.scheduler._awaits_masks(self.pool.epoch)
        while most and (plan := self.scheduler.schedule(self.now)) is not None:
            self.executor.receive(plan.encode(self.num_epochs).SerializeToString())
            most -= 1
        assert not self.flush()

    def deliver(self) -> None:
        assert self.executor is not None
        self.apply(self.executor.take_result())

    def apply(self, result: Result) -> None:
        """Hand a result to the core: living requests get every token of it, unless an error spoiled it."""
        assert self.executor is not None
        self.injected_seeds |= self.executor.injected_seeds
        self.errors_in_epoch |= bool(result.failed_seeds)
        living = [row for row in result.rows if self.clients.is_waiting(row.seed)]
        due = [(row.seed, row.token) for row in living if row.clean]
        self.counts["late tokens"] += len(result.rows) - len(living)
        self.counts["tokens of preempted"] += sum(self.clients.all[row.seed].request.slot is None for row in living)
        self.counts["late stops"] += self.executor.num_plans_in_flight > 0 and any(
            row.reason == pb.FINISH_REASON_STOP for row in result.rows
        )
        self.counts["damaged tokens"] += sum(not row.clean for row in result.rows)
        self.counts["failed steps"] += len(result.failed_seeds)
        settlement.apply_result(self.pool, decode_result(executor_pb2.StepResult.FromString(result.message)))
        news = sorted(self.flush())
        if self.errors_in_epoch:
            assert set(news) <= set(due), "a token of a damaged step"
        else:
            assert news == sorted(due), "a token that was computed did not reach its stream, or one that was not did"

    # --- the end -------------------------------------------------------------------------------------------------

    def finish_flights(self) -> None:
        while self.executor is not None and self.is_busy():
            if self.executor.queued:
                self.executor.run_plan()
            else:
                self.deliver()

    def check_nothing_left(self) -> None:
        epoch, executor = self.pool.epoch, self.executor
        assert epoch is not None
        assert executor is not None
        assert not any(self.clients.is_waiting(client.request.stream) for client in self.clients.all), "no end"
        assert (len(self.pool.requests), len(self.pool.waiting), len(epoch.running)) == (0, 0, 0)
        assert epoch.blocks.num_free_blocks == executor.limits.num_blocks, "blocks are missing"
        assert not any(epoch.blocks.ref_counts), "a reference leaked"
        assert not epoch.blocks.table_lens.any(), "a table is left"
        assert sorted(epoch.free_slots) == list(range(executor.limits.num_slots))
        assert set(epoch.released_slots) == set(executor.slots), "the executor's slots are not the core's"
        assert (len(epoch.records), epoch.num_plans_in_flight) == (0, 0)
        epoch.blocks.check()
        self.counts.update(executor.counts)
        self.counts.update(f"ended by {client.end}" for client in self.clients.all)


def _generated(request: Request) -> tuple[int, ...]:
    return tuple(request.token_ids[request.num_prompt_tokens :])
