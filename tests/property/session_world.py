"""The processes of one random life, how they work, and how they die."""

import random
from collections import Counter

from executor_service.plan import Limits
from protos.duet.executor.v1 import executor_pb2
from scheduler_service.core import settlement
from scheduler_service.core.epoch import ExecutorLimits
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.scheduler import Policy
from scheduler_service.core.step_plan import StepPlan, decode_result
from scheduler_service.core.waiting_queue import ORDERS
from tests.property.fake_executor import FakeExecutor
from tests.property.fake_results import Result
from tests.property.session_clients import Known
from tests.property.session_core import Core, request_name
from tests.property.session_frontend import FrontEnd
from tests.property.session_wire import Link

VOCAB_SIZE = 5
MAX_MODEL_LEN = 30
START = 1e10  # seconds; far beyond any time.monotonic(), by which front ends and core would hold a deadline passed
NUM_FRONT_ENDS = 2

Token = tuple[int, int, int]  # an outbox, a stream, and a token for it


class World:
    """One executor, one core, and front ends. Everything follows from the seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.now = START
        self.block_size = rng.randint(2, 4)
        self.failure_rate = rng.choice([0.0, 0.0, 0.0, 0.02, 0.2])
        self.device_time_ns = rng.choice([0, 1_000_000, 1_000_000, 5_000_000])
        self.order = ORDERS[rng.choice(list(ORDERS))]
        self.max_waiting = rng.choice([3, 100, 100, 100])
        self.policy = Policy(rng.randint(1, 4), rng.choice([0.0, 0.005, 0.4]))
        self.reconnecting = rng.choice([0.05, 0.3])  # at each act, where a front end has no connection
        self.poison: dict[int, int] = {}  # name -> the position at which it kills
        self.known = Known(self.now, set(), set())
        self.executor: FakeExecutor | None = None  # None: the core has no session
        self.num_epochs = 0
        self.may_lack_tokens = False  # in this epoch: of steps that failed
        self.longest = 0  # tokens of the longest request
        self.crashes: Counter[Request] = Counter()  # executors that died of it
        self.gained: Counter[Request] = Counter()  # tokens that executors brought for it
        self.doubts: Counter[Request] = Counter()  # executors that died with a plan of it, since its last token
        self.core = self.new_core()
        self.front_ends = [FrontEnd() for _ in range(NUM_FRONT_ENDS)]
        self.links: dict[FrontEnd, Link] = {}
        self.dying: list[Link] = []  # of front ends that are gone: the core may not have read everything

    def new_core(self) -> Core:
        """A process that has just started."""
        return Core(RequestPool(self.order, self.max_waiting, clock=lambda: self.now), self.policy, self.counts)

    # --- the core and its executor -------------------------------------------------------------------------------

    def connect(self) -> None:
        """The core opens an epoch on an empty executor, now and then of another size."""
        rng, size = self.rng, self.block_size
        smallest = -(-max(self.longest, 20) // size) if rng.random() < 0.9 else -(-20 // size)
        num_blocks, num_slots = smallest + rng.choice([0, 1, 2, 4, 20]), rng.randint(1, 6)
        budget, max_inflight = rng.choice([1, 2, 4, 8, 16, 40]), rng.randint(1, 6)
        self.num_epochs += 1
        self.may_lack_tokens = False
        limits = Limits(num_slots, num_blocks, size, VOCAB_SIZE, MAX_MODEL_LEN, budget)
        self.executor = FakeExecutor(limits, min(max_inflight, self.policy.max_inflight_steps), self.num_epochs, rng)
        self.executor.failure_rate, self.executor.device_time_ns = self.failure_rate, self.device_time_ns
        self.executor.poison = self.poison
        self.core.begin_epoch(ExecutorLimits(size, num_blocks, num_slots, budget, MAX_MODEL_LEN, max_inflight))
        assert not self.flush()

    def flush(self) -> list[Token]:
        """What the core has to say goes on its way; returns the tokens among it, sorted."""
        news = [
            (id(outbox), stream, token)
            for outbox in self.core.outboxes()
            for stream, token in zip(outbox.streams, outbox.token_ids, strict=True)
        ]
        self.core.pump()
        return sorted(news)

    @property
    def is_busy(self) -> bool:
        """Whether the core waits for a result."""
        return self.executor is not None and self.executor.num_plans_in_flight > 0

    def pump(self, most: int) -> None:
        """The core sends plans."""
        core, epoch = self.core, self.core.pool.epoch
        if epoch is None or self.executor is None:
            assert core.scheduler.schedule(self.now) is None
            return
        self.counts["plans held back for masks"] += core.scheduler._awaits_masks(epoch)
        while most and (plan := core.scheduler.schedule(self.now)) is not None:
            for sequence in plan.new_sequences:
                request = epoch.running[sequence.slot]
                core.seated.append(request)
                is_doubtful = self.doubts[request] >= 2
                assert is_doubtful == (request is epoch.on_trial), "tried alone without cause, or not tried"
            self.check_trial(plan)
            self.executor.receive(plan.encode(self.num_epochs).SerializeToString())
            most -= 1
        assert not self.flush()

    def check_trial(self, plan: StepPlan) -> None:
        """While a request is tried alone, or some wait for that, nobody else runs, and nothing for long."""
        pool, epoch = self.core.pool, self.core.pool.epoch
        assert epoch is not None
        if not pool.quarantine and epoch.on_trial is None:
            return
        running = epoch.unacknowledged()
        assert running == {epoch.on_trial}, "one that executors may have died of runs, and not alone"
        assert not plan.iterations, "a trial of more than a token"
        self.counts["trials"] += bool(plan.new_sequences)

    def deliver(self) -> None:
        """The oldest result reaches the core."""
        assert self.executor is not None
        self.apply(self.executor.take_result())

    def apply(self, result: Result) -> None:
        """Hand a result to the core: living requests get every token of it, unless an error spoiled it."""
        assert self.executor is not None
        self.note_failures()
        self.may_lack_tokens |= result.has_failures
        owners = [(self.core.seated[row.seating], row) for row in result.rows]
        living = [(request, row) for request, row in owners if request.state is not RequestState.FINISHED]
        due = sorted((id(request.outbox), request.stream, row.token) for request, row in living if row.clean)
        self.gained.update(request for request, _ in living)
        for request, _ in living:
            self.doubts[request] = 0
        self.counts["late tokens"] += len(result.rows) - len(living)
        self.counts["tokens of preempted"] += sum(request.slot is None for request, _ in living)
        self.counts["tokens of detached"] += sum(request.outbox is self.core.pool.unheard for request, _ in living)
        self.counts["late stops"] += self.executor.num_plans_in_flight > 0 and any(
            row.reason == settlement.FINISH_REASON_STOP for row in result.rows
        )
        self.counts["damaged tokens"] += sum(not row.clean for row in result.rows)
        settlement.apply_result(self.core.pool, decode_result(executor_pb2.StepResult.FromString(result.message)))
        news = self.flush()
        if self.may_lack_tokens:
            assert not Counter(news) - Counter(due), "a token of a damaged step"
        else:
            assert news == due, "a token that was computed did not reach its stream, or one that was not did"

    def note_failures(self) -> None:
        """Remember whose steps failed."""
        if self.executor is not None:
            self.known.failed_names |= self.executor.failed_names

    # --- deaths --------------------------------------------------------------------------------------------------

    def kill_executor(self) -> None:
        """It dies; some of what it answered still comes, and until the core knows, plans go nowhere."""
        if self.executor is None or self.executor.is_dead:
            return
        self.counts["executors killed"] += 1
        self.executor.is_dead = True
        self.lose_results()

    def lose_results(self) -> None:
        """Of what a dead executor answered, a part is lost."""
        assert self.executor is not None
        for _ in range(self.rng.randint(0, len(self.executor.results))):
            self.executor.results.pop()

    def run_plan(self) -> None:
        """The executor runs its oldest plan, and may die of it."""
        executor = self.executor
        assert executor is not None
        executor.run_plan()
        if executor.culprit is None:
            return
        culprit = self.core.seated[executor.culprit]
        self.crashes[culprit] += 1
        self.counts["executors that died of a request"] += 1
        bound = 3 + 2 * self.gained[culprit]  # two for each token that it was given, and three when it gets no further
        assert self.crashes[culprit] <= bound, f"{self.crashes[culprit]} executors died of one request"
        self.lose_results()

    def lose(self, *, in_order: bool = False) -> None:
        """The core's session ends, and with it all that the executor holds and all that is on its way."""
        executor, pool, epoch = self.executor, self.core.pool, self.core.pool.epoch
        if executor is None or epoch is None:
            return
        self.counts["losses"] += 1
        self.counts["losses in order"] += in_order
        self.counts["losses with plans in flight"] += executor.num_plans_in_flight > 0
        self.end_executor()
        living = list(pool.requests.values())
        is_convicted = not in_order and epoch.on_trial in epoch.unacknowledged()
        convicted = [request for request in living if is_convicted and request is epoch.on_trial]
        self.known.convicted_names |= {request_name(request) for request in convicted}
        if not in_order:
            self.doubts.update(epoch.unacknowledged())
        self.core.end_epoch(in_order=in_order)
        failed = [request for request in living if request.state is RequestState.FINISHED]
        assert failed == convicted, "another one is convicted than he with whom alone the executor died"
        if executor.culprit is not None:
            culprit = self.core.seated[executor.culprit]
            assert convicted in ([], [culprit]), "the executor died of another one"
            self.counts["culprits convicted"] += convicted == [culprit]
        self.counts["innocents convicted by chance"] += bool(convicted) and executor.culprit is None
        assert not self.flush()

    def end_executor(self) -> None:
        """Nothing more comes of it."""
        if self.executor is not None:
            self.note_failures()
            self.counts.update(self.executor.counts)
            self.executor = None

    def kill_core(self) -> None:
        """The core dies: each front end may still read some of what it wrote. Another one starts at once."""
        self.counts["cores killed"] += 1
        self.counts["cores killed with requests"] += bool(self.core.pool.requests)
        for link in [*self.links.values(), *self.dying]:
            link.lose_core(self.rng.randint(0, len(link.down.frames)))
        self.end_executor()
        self.core = self.new_core()

    def kill_front_end(self) -> None:
        """A front end dies: the core may still read some of what it wrote. Another one takes its place."""
        front_end = self.rng.choice(self.front_ends)
        self.counts["front ends killed"] += 1
        if (link := self.links.pop(front_end, None)) is not None:
            link.lose_front_end(self.rng.randint(0, len(link.up.frames)))
            self.dying.append(link)
        self.front_ends[self.front_ends.index(front_end)] = FrontEnd()
        self.cut_calls(front_end)

    def cut_calls(self, front_end: FrontEnd) -> None:
        """Told of a front end that is gone."""
        raise NotImplementedError

    def break_connection(self) -> None:
        """Between a front end and the core, both alive."""
        if self.links:
            link = self.rng.choice(list(self.links.values()))
            link.up.cut(self.rng.randint(0, len(link.up.frames)))
            link.down.cut(self.rng.randint(0, len(link.down.frames)))

    # --- the socket ----------------------------------------------------------------------------------------------

    def carry(self) -> None:
        """Some of what is under way arrives, and front ends connect."""
        rng = self.rng
        for front_end in self.front_ends:
            link = self.links.get(front_end)
            if link is None or link.front_end_side is None:
                if rng.random() < self.reconnecting:
                    while link is not None and not link.is_over:  # the core has long read what came before
                        link.carry_up()
                    self.links[front_end] = Link(front_end.core, self.core.frontends)
                continue
            while rng.random() < 0.7:
                link.carry_up()
            while rng.random() < 0.7:
                link.carry_down()
        for link in list(self.dying):
            link.carry_up()
            if link.is_over:
                self.dying.remove(link)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is under way between front ends and core."""
        return all(link.is_quiet for link in [*self.links.values(), *self.dying])

    def hang_up(self) -> None:
        """The test is over."""
        for link in [*self.links.values(), *self.dying]:
            link.close()
