"""The core between two deaths: the real one but for the event loop, the executor's session and the grammar worker."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from scheduler_service.core import masks, resumption
from scheduler_service.core.epoch import ExecutorLimits
from scheduler_service.core.frontends import Connection, Frontends
from scheduler_service.core.outbox import Outbox
from scheduler_service.core.request import Request, RequestKey, RequestState
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.retained import NO_CLIENT, Retained
from scheduler_service.core.scheduler import Policy, Scheduler
from scheduler_service.ipc import EngineStatus, ModelInfo, Submit
from tests.property.fake_model import as_column, mask_for, name_of

if TYPE_CHECKING:
    from scheduler_service.core.engine import Engine

MaskJob = tuple[Request, tuple[int, ...]]  # and the generated tokens that the worker was told


class _Frontends(Frontends):
    """Counts what comes, and checks that results are kept."""

    def __init__(self, core: "Core", counts: Counter[str]) -> None:
        super().__init__(cast("Engine", core))
        self._core = core
        self._counts = counts

    def _submit(self, connection: Connection, message: Submit) -> None:
        key = (message.tenant, message.request_id)
        before = list(resumption.known_choices(self._core.pool, key) or [])
        super()._submit(connection, message)
        after = resumption.known_choices(self._core.pool, key) or []
        if any(one.outbox is connection.outbox and one.stream in message.streams for one in after):
            self._core.see_client_come(key)
        if message.progress:
            self._counts["resubmissions"] += 1
            self._counts["resubmissions that were merged"] += bool(before)
            self._counts["resubmissions that replaced a shorter one"] += bool(before) and before != after
        elif message.resumes and before:
            if before != after:
                self._counts["resumptions that generate anew"] += 1
            elif connection.outbox is not after[0].outbox:
                self._counts["resumptions that came too late"] += 1
            elif all(request.state is RequestState.FINISHED for request in after):
                self._counts["resumptions of ended requests"] += 1
                ends = (*connection.outbox.finished, *connection.outbox.failed)
                assert {end.stream for end in ends} == {*message.streams}, "a result was not kept"
            else:
                self._counts["resumptions of living requests"] += 1


class Core:
    """Stands for the Engine."""

    def __init__(self, pool: RequestPool, policy: Policy, counts: Counter[str]) -> None:
        self.pool = pool
        self.scheduler = Scheduler(pool, policy)
        self.frontends = _Frontends(self, counts)
        self.seated: list[Request] = []  # in the order in which the executor is told of them
        self.mask_jobs: list[MaskJob] = []
        self._model: ModelInfo | None = None
        self._lonely: dict[tuple[Retained, bool], float] = {}  # see watch_lonely
        self._grammars: dict[Request, list[int]] = {}  # the generated tokens that the worker has of each

    @property
    def status(self) -> EngineStatus:
        """Of the Engine."""
        return EngineStatus(ready=self.pool.epoch is not None, epoch=0, queue_order="", model=self._model)

    def pump(self) -> None:
        """Of the Engine, but for plans, which go out at the test's word."""
        self.frontends.flush()
        self.pool.unheard.take()

    def leave_all(self, outbox: Outbox) -> None:
        """Of the Engine."""
        resumption.leave_all(self.pool, outbox)
        self.pump()

    def outboxes(self) -> Iterator[Outbox]:
        """Where news may be, until the next `pump`."""
        yield self.pool.unheard
        for connection in self.frontends._connections:
            yield connection.outbox

    def begin_epoch(self, limits: ExecutorLimits) -> None:
        """As the Engine does."""
        self.seated.clear()
        self._model = ModelInfo("", "", "", "", 0, limits.max_model_len, limits.num_blocks * limits.block_size)
        self.pool.begin_epoch(limits)
        self.frontends.broadcast_status()

    def end_epoch(self, *, in_order: bool) -> None:
        """As the Engine does."""
        self.pool.end_epoch(in_order=in_order)
        self.frontends.broadcast_status()

    def sweep(self, now: float) -> None:
        """As the Engine does: what may be resumed is kept as long as it was asked for, and no longer."""
        self.pool.expire(now)
        self.watch_lonely(now)
        resumption.expire(self.pool, now)
        kept = self.pool.retained.values()
        for (retained, _), since in self._lonely.items():
            left_s = since + retained._detach_s - now
            assert abs(left_s) < 0.001 or (left_s > 0) == (retained in kept), "kept too long, or not long enough"

    def watch_lonely(self, now: float) -> None:
        """See since when the requests that may be resumed have ended, or have had no client."""
        lonely = [
            (one, one.has_ended)
            for one in self.pool.retained.values()
            if all(request.state is RequestState.FINISHED or request.stream == NO_CLIENT for request in one.choices)
        ]
        self._lonely = {key: self._lonely.get(key, now) for key in lonely}

    def see_client_come(self, key: RequestKey) -> None:
        """A client has it, be it that it is gone again at once."""
        self._lonely = {watched: since for watched, since in self._lonely.items() if watched[0].choices[0].key != key}

    def ask_for_masks(self) -> None:
        """As MaskSource does: the worker is told a grammar with all generated tokens, then one token at a time."""
        unmasked, self.pool.unmasked = self.pool.unmasked, []
        for request in unmasked:
            if request.state is RequestState.FINISHED:
                continue
            if request in self._grammars:
                self._grammars[request].append(request.token_ids[-1])
            else:
                self._grammars[request] = request.token_ids[request.num_prompt_tokens :].tolist()
            self.mask_jobs.append((request, tuple(self._grammars[request])))

    def answer(self, job: MaskJob, vocab_size: int) -> int:
        """The worker has the mask of a living request; returns it, 0 where the text is complete."""
        request, generated = job
        assert list(generated) == self._grammars[request], "the tokens changed while their mask was computed"
        mask = mask_for(request_name(request), generated, vocab_size)
        masks.give_mask(self.pool, request, as_column(mask))
        return mask

    def check_nothing_left(self) -> None:
        """When no request is alive, no plan is in flight, and what was retained has expired."""
        epoch = self.pool.epoch
        assert epoch is not None
        self.pool.check_idle()
        epoch.check_idle()
        assert not self.pool.retained, "a request is kept for ever"
        assert not any(connection.requests for connection in self.frontends._connections), "a stream is left"
        assert epoch.on_trial is None, "a trial never ended"


def request_name(request: Request) -> int:
    """What the fakes know it by."""
    return name_of(request.sampling.seed, request.choice_index)
