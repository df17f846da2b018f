"""One random life of clients, front ends, core and executor, each of which may die."""

from array import array
from collections import Counter

import msgspec

from scheduler_service.core import masks
from scheduler_service.core.request import RequestState
from scheduler_service.ipc import Sampling, Submit
from tests.property.fake_model import CONSTRAINED_TOP_K
from tests.property.session_clients import Client
from tests.property.session_frontend import Call, FrontEnd
from tests.property.session_world import MAX_MODEL_LEN, VOCAB_SIZE, World

MAX_ACTIONS = 5_000  # of one run: far more than any needs
FOREVER_S = 1e6


class SessionRun(World):
    """Everything follows from the seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        rng = self.rng
        self.constrained = rng.choice([0.0, 0.3, 1.0])  # of the requests
        self.poisonous = rng.choice([0.0, 0.0, 0.0, 0.1, 0.3])  # of the choices
        self.detachable = rng.choice([0.0, 0.5, 1.0])  # of the requests
        self.eager = rng.random() < 0.5  # plans go out as soon as they can, as in the engine
        self.disturbance = rng.choice([0.0, 0.02, 0.1])  # of the acts
        self.disturbances = [
            *(self.cancel, self.cancel, self.leave, self.lose_touch, self.stop),
            *(self.kill_executor, self.kill_executor, self.lose, self.stop_executor, self.stop_waiting),
            *(self.kill_core, self.kill_front_end, self.break_connection, self.fail_network),
        ]
        self.clients: list[Client] = []
        self.cut_off: list[Call] = []  # their clients are gone, and their front ends do not know
        self.num_to_submit = rng.randint(3, 12)
        self.prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(14)] for _ in range(rng.randint(1, 2))]

    def run(self) -> Counter[str]:
        """Live until all is told, and check that nothing is left behind."""
        try:
            for _ in range(MAX_ACTIONS):
                self.act()
                if self.is_over:
                    break
            assert self.is_over, "a request starved"
            self.wind_up()
            self.check_nothing_left()
        finally:
            self.hang_up()
        self.counts["runs"] += 1
        return self.counts

    @property
    def is_over(self) -> bool:
        """Whether no client waits, nothing is under way, and the core has nothing to do."""
        is_told = not self.num_to_submit and all(client.end is not None for client in self.clients)
        is_idle = self.executor is not None and not self.executor.is_dead and not self.core.pool.requests
        return is_told and is_idle and self.is_quiet

    def act(self) -> None:
        """One random event."""
        rng = self.rng
        self.now += rng.choice([0.0, 0.001, 0.003])
        if rng.random() < self.disturbance:
            rng.choice(self.disturbances)()
        if rng.random() < 0.05:
            self.sweep()
        self.carry()
        if rng.random() < 0.5:
            self.read()
        if self.num_to_submit and rng.random() < 0.2:
            self.submit()
        self.come_back()
        self.work()
        self.core.ask_for_masks()
        if self.core.mask_jobs and rng.random() < 0.4:
            self.give_masks()
        if self.eager or not self.is_busy:
            self.pump(most=100)
            core = self.core
            is_idle = self.executor is None or not core.pool.requests or core.mask_jobs or core.pool.unmasked
            assert self.is_busy or is_idle, "requests live and nothing runs"
        self.core.watch_lonely(self.now)

    def work(self) -> None:
        """The executor, or what there is in its place."""
        rng, event = self.rng, self.rng.random()
        if self.executor is None:
            if event < 0.3:
                self.connect()
        elif self.executor.is_dead and event < 0.2:
            self.lose()
        elif event < 0.4 and self.executor.queued and not self.executor.is_dead:
            self.run_plan()
        elif event < 0.8 and self.executor.results:
            self.deliver()
        elif not self.eager:
            self.pump(most=rng.choice([1, 100]))

    # --- clients -------------------------------------------------------------------------------------------------

    def ready_front_ends(self) -> list[FrontEnd]:
        """Those that would submit at once."""
        return [front_end for front_end in self.front_ends if front_end.model is not None]

    def submit(self) -> None:
        """A new client comes; now and then another one takes its id by mistake."""
        rng, ready = self.rng, self.ready_front_ends()
        if not ready:
            return
        self.num_to_submit -= 1
        client = self.new_client()
        client.ask(rng.choice(ready), client.submit)
        if client.submit.detach_s is None and rng.random() < 0.05:
            other = self.new_client()
            other.submit = msgspec.structs.replace(other.submit, request_id=client.submit.request_id, detach_s=None)
            other.shares_id = client.shares_id = True
            other.ask(rng.choice(ready), other.submit)

    def new_client(self) -> Client:
        """One who has not asked yet."""
        rng, seed = self.rng, len(self.clients)
        shared = rng.choice(self.prompts)[: rng.randint(0, 14)]
        prompt = shared + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0 if shared else 1, 4))]
        capacity = min(MAX_MODEL_LEN, self.executor.limits.num_blocks * self.block_size if self.executor else 20)
        max_tokens = max(1, min(rng.randint(1, 10), capacity - len(prompt)))
        is_constrained = rng.random() < self.constrained
        self.now += 1e-5  # no two ask at the same time
        submit = Submit(
            streams=[],
            request_id=f"request {seed}",
            token_ids=array("i", prompt).tobytes(),
            sampling=Sampling(
                seed=seed,
                top_k=CONSTRAINED_TOP_K if is_constrained else 0,
                logprobs=rng.choice([None, None, 0, 1]),
                prompt_logprobs=rng.choice([None, None, None, None, 0, 1]),
            ),
            stop_token_ids=rng.choice([[], [], [rng.randrange(VOCAB_SIZE)]]),
            end_token_ids=[],
            max_tokens=max_tokens,
            priority=rng.randint(-1, 1),
            cache_salt=rng.choice(["", "", "pepper"]),
            arrival=self.now,
            deadline=self.now + rng.choice([0.05, 0.5]) if rng.random() < self.disturbance else None,
            constraint="a grammar" if is_constrained else None,
            detach_s=rng.choice([0.02, 0.5]) if rng.random() < self.detachable else None,
        )
        client = Client(submit, rng.choice([1, 1, 1, 2]), VOCAB_SIZE)
        self.clients.append(client)
        self.longest = max(self.longest, len(prompt) + max_tokens)
        for name in client.names:
            if rng.random() < self.poisonous:
                self.poison[name] = rng.randrange(len(prompt) + max_tokens)
        return client

    def read(self) -> None:
        """Clients read what their front ends have for them."""
        self.note_failures()
        self.known.now = self.now
        for client in self.clients:
            client.read(self.known)

    def some_client(self) -> Client | None:
        """One whose stream goes on."""
        waiting = [client for client in self.clients if client.call is not None]
        return self.rng.choice(waiting) if waiting else None

    def leave(self) -> None:
        """A client hangs up; its front end hears of it at once."""
        if (client := self.some_client()) is not None:
            client.comes_back = self.rng.random() < 0.7
            client.leave()
            self.counts["clients that left"] += 1

    def lose_touch(self) -> None:
        """A client is cut off, and its front end does not notice."""
        if (client := self.some_client()) is not None and client.call is not None:
            self.cut_off.append(client.call)
            client.comes_back = self.rng.random() < 0.9
            client.lose_touch()
            self.counts["clients that were cut off"] += 1

    def fail_network(self) -> None:
        """Clients are cut off, and then the core dies: two front ends may tell the next one of their requests."""
        for _ in range(3):
            self.lose_touch()
        self.kill_core()

    def come_back(self) -> None:
        """Clients resume through whatever front end; front ends notice those that are gone."""
        rng, ready = self.rng, self.ready_front_ends()
        for client in self.clients:
            if ready and client.call is None and client.end is None and rng.random() < 0.1:
                self.now += 1e-5
                submit = msgspec.structs.replace(client.submit, resumes=True, arrival=self.now)
                client.ask(rng.choice(ready), submit)
        for call in list(self.cut_off):
            if rng.random() < 0.05:
                self.cut_off.remove(call)
                call.close()

    def cut_calls(self, front_end: FrontEnd) -> None:
        """Those that had called the front end look for another one, or are gone."""
        self.cut_off = [call for call in self.cut_off if call.front_end is not front_end]
        for client in self.clients:
            if client.call is not None and client.call.front_end is front_end:
                client.comes_back = self.rng.random() < 0.9
                client.lose_touch()

    def cancel(self) -> None:
        """Somebody cancels by id, through any front end."""
        if (client := self.some_client()) is not None:
            for other in self.clients:
                other.is_cancelled |= other.submit.request_id == client.submit.request_id
            self.rng.choice(self.front_ends).cancel(client.submit)

    def stop(self) -> None:
        """A front end finds a stop string."""
        if (client := self.some_client()) is not None and client.call is not None:
            texts = [stream for stream in client.call.streams if stream.token_ids]
            if texts:
                client.is_stopped = True
                client.call.front_end.core.stop_stream(self.rng.choice(texts))

    # --- the core ------------------------------------------------------------------------------------------------

    def give_masks(self) -> None:
        """The grammar worker answers some of its jobs; now and then a grammar turns out to be wrong."""
        jobs = self.core.mask_jobs
        self.rng.shuffle(jobs)
        for _ in range(self.rng.randint(1, len(jobs))):
            job = jobs.pop()
            request = job[0]
            if request.state is RequestState.FINISHED:
                self.counts["masks of ended requests"] += 1
                continue
            self.counts["masks of preempted requests"] += request.state is RequestState.WAITING
            if self.rng.random() < self.disturbance / 10:
                self.clients[request.sampling.seed].is_refused = True
                masks.refuse(self.core.pool, request, "too complex")
            else:
                self.counts["texts that were complete"] += not self.core.answer(job, VOCAB_SIZE)
        self.flush()

    def sweep(self) -> None:
        """Time is up for some."""
        self.core.sweep(self.now)
        self.flush()

    def stop_waiting(self) -> None:
        """There was no executor for too long."""
        if self.executor is None:
            self.core.pool.fail_older_than(self.now - 0.05, "no executor")
            self.flush()

    def stop_executor(self) -> None:
        """The executor ends as it was told to."""
        if self.executor is not None and not self.executor.is_dead:
            self.lose(in_order=True)

    # --- the end -------------------------------------------------------------------------------------------------

    def wind_up(self) -> None:
        """What is under way arrives, plans end, clients hang up, and what was kept for them expires."""
        for call in self.cut_off:
            call.close()
        while not self.is_quiet:
            self.carry()
        while self.executor is not None and self.is_busy:
            if self.executor.is_dead:
                self.lose()
                self.connect()
            elif self.executor.queued:
                self.run_plan()
            else:
                self.deliver()
        self.pump(most=1)
        self.core.watch_lonely(self.now)
        self.now += FOREVER_S
        self.sweep()

    def check_nothing_left(self) -> None:
        """In the core, the executor and the front ends."""
        self.core.check_nothing_left()
        epoch, executor = self.core.pool.epoch, self.executor
        assert epoch is not None
        assert executor is not None
        assert set(epoch.released_slots) == set(executor.slots), "the executor's slots are not the core's"
        for front_end in self.front_ends:
            assert not front_end.calls, "a call is left"
            assert not front_end.core._streams, "a stream is left"
            assert not front_end.core._holdings, "a request is held that nobody wants"
        self.end_executor()
        self.counts["preemptions"] += self.core.pool.counters.preemptions
        self.counts.update(f"ended by {client.end}" for client in self.clients)
