"""What runs next.

A request has no prefill phase nor decode phase here, only known tokens whose KV entries do not exist yet: a fresh
prompt, the rest of a chunked one, or everything a preempted request had. Plans are sent ahead of their results; a
token that the core does not know yet is on the device already, so nothing waits for it.
"""

import dataclasses

from scheduler_service.core.epoch import Epoch
from scheduler_service.core.prefix_cache import extend_digests
from scheduler_service.core.request import Request, RequestState
from scheduler_service.core.request_pool import RequestPool
from scheduler_service.core.step_plan import Chunk, StepPlan, new_sequence

MAX_ITERATED_NS = 4e6  # a plan of several decode steps takes at most this long on the device
MAX_ITERATIONS = 16
MAX_DEFERRED = 64  # twins of prompts in the plan that are looked at before the rest waits for the next plan


@dataclasses.dataclass(frozen=True)
class Policy:
    """The choices that are left to the operator."""

    max_inflight_steps: int = 2
    max_decode_stall_s: float = 0.4
    step_timeout_s: float = 60.0  # the least that any plan may take before it is taken to hang


class Scheduler:
    """Builds step plans from the pool's queues, and changes the pool as if they had run."""

    def __init__(self, pool: RequestPool, policy: Policy) -> None:
        self._pool = pool
        self._policy = policy

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan to send, or None where nothing can run or enough plans are in flight.

        While prompts wait, plans hold prefill only, for at most max_decode_stall; then decode goes on beside it.
        `now` is in monotonic seconds.
        """
        epoch = self._pool.epoch
        if epoch is None:
            return None
        if epoch.num_plans_in_flight >= min(self._policy.max_inflight_steps, epoch.limits.max_inflight_plans):
            return None
        self._end_trial(epoch)
        if self._pool.quarantine or epoch.on_trial is not None:
            return self._try_alone(epoch, now)
        if self._awaits_masks(epoch):
            return None
        plan = StepPlan(epoch.next_step_id)
        leaving, epoch.leaving = epoch.leaving, []
        joined = self._join_decode_set(epoch)
        budget = epoch.limits.max_tokens_per_step
        if self._may_stall_decode(epoch, now):
            self._prefill(epoch, plan, budget, now, admit=True)
        if not plan.chunks and epoch.is_decoding:
            any_preempted = self._decode(epoch, plan)
            self._prefill(epoch, plan, budget - len(epoch.decode_set), now, admit=not any_preempted)
        if not plan.chunks and not plan.iterations:
            epoch.leaving = [request for request in leaving if request.slot is not None]
            return None
        self._change_decode_set(epoch, plan, leaving, joined)
        self._track_stall(epoch, plan, now)
        return self._send(epoch, plan, now)

    def _send(self, epoch: Epoch, plan: StepPlan, now: float) -> StepPlan:
        plan.release_slots = epoch.take_released_slots()
        plan.timeout_ms = epoch.timeout_ms(plan, self._policy.step_timeout_s)
        epoch.remember(plan, now)
        return plan

    def _join_decode_set(self, epoch: Epoch) -> list[Request]:
        """Those that sampled their first token in the last plan decode from this one on, unless one was enough."""
        joined = [request for request in epoch.joining if request.num_prefilled + 1 < request.max_total_tokens]
        epoch.joining.clear()
        for request in joined:
            epoch.decode_set.join(request, request.num_prefilled)
        return joined

    def _change_decode_set(self, epoch: Epoch, plan: StepPlan, leaving: list[Request], joined: list[Request]) -> None:
        """Tell the executor who joins and leaves; a constrained request that decodes again stays."""
        masked = {slot for slot in plan.mask_slots if slot in epoch.decode_set}
        resting = {request.slot for request in leaving if request.slot is not None}
        plan.join_slots = [request.slot for request in joined if request.slot is not None] + sorted(masked - resting)
        plan.leave_slots = sorted(resting - masked)

    def _may_stall_decode(self, epoch: Epoch, now: float) -> bool:
        """Whether one more plan of prefill only keeps the decode set waiting no longer than it may.

        The device is behind by the prefill in flight, and would be by a full plan more.
        """
        if epoch.stalled_since is None or not epoch.is_decoding:
            return True
        stall_s = now - epoch.stalled_since + epoch.prefill_s(epoch.limits.max_tokens_per_step)
        return stall_s < self._policy.max_decode_stall_s

    def _track_stall(self, epoch: Epoch, plan: StepPlan, now: float) -> None:
        if not plan.chunks or not epoch.is_decoding:
            epoch.stalled_since = None
        elif epoch.stalled_since is None:
            epoch.stalled_since = now

    # --- prefill -------------------------------------------------------------------------------------------------

    def _prefill(self, epoch: Epoch, plan: StepPlan, budget: int, now: float, *, admit: bool) -> None:
        """Fill the token budget with chunks: of requests that have begun, then of waiting ones."""
        for request in list(epoch.prefilling):
            if budget == 0:
                return
            budget -= self._add_chunk(epoch, plan, request, budget)
        if not admit:
            return
        deferred: list[Request] = []
        while budget and len(deferred) < MAX_DEFERRED:
            request = self._pool.waiting.peek()
            if request is None or not self._can_seat(epoch, request):
                break
            extend_digests(request.block_digests, request.token_ids, epoch.blocks.block_size, request.cache_salt)
            takes_hits = not request.num_prompt_logprobs  # they need every position of the prompt computed
            hits = epoch.blocks.find_prefix(request.block_digests, request.token_ids) if takes_hits else []
            if request.awaits_leader or (takes_hits and self._awaits_twin(epoch, plan, request, len(hits))):
                deferred.append(self._pool.waiting.pop())
                continue
            if epoch.blocks.num_free_after(hits, len(request.token_ids)) < self._reserve(epoch):
                break
            self._pool.waiting.pop()
            self._seat(epoch, plan, request, hits, now)
            budget -= self._add_chunk(epoch, plan, request, budget)
        for request in deferred:
            self._pool.waiting.push(request)

    def _can_seat(self, epoch: Epoch, request: Request) -> bool:
        """Whether a slot is free, and it is known what a preempted request has and what may follow that.

        Plans in flight may still bring a token of it, and the mask of a constrained one follows its last token.
        """
        num_seats = min(epoch.limits.num_slots, epoch.limits.max_tokens_per_step)
        lacks_mask = request.constraint is not None and request.mask is None
        return len(epoch.running) < num_seats and not epoch.is_in_flight(request) and not lacks_mask

    def _reserve(self, epoch: Epoch) -> int:
        """Blocks kept free at an admission, so that running sequences do not at once preempt the newcomer."""
        return epoch.blocks.num_blocks // 100 if epoch.running else 0

    def _awaits_twin(self, epoch: Epoch, plan: StepPlan, request: Request, num_hits: int) -> bool:
        """Whether the next block of the request's prefix is computed by this very plan, to be hit by the next one."""
        if num_hits >= (len(request.token_ids) - 1) // epoch.blocks.block_size:
            return False
        return request.block_digests[num_hits] in plan.digests

    def _seat(self, epoch: Epoch, plan: StepPlan, request: Request, hits: list[int], now: float) -> None:
        slot = epoch.seat(request, hits)
        request.prompt_logprobs.clear()
        plan.new_sequences.append(new_sequence(request, slot, epoch.blocks.table(slot), request.num_prefilled))
        if not request.started:
            request.cached_tokens = request.num_prefilled
            self._pool.counters.prompt_tokens += request.num_prompt_tokens
            self._pool.counters.cached_tokens += request.cached_tokens
        self._pool.start(request, now)

    def _add_chunk(self, epoch: Epoch, plan: StepPlan, request: Request, budget: int) -> int:
        """Plan the next known tokens of a seated request, at most `budget`; returns how many."""
        assert request.slot is not None
        start, num_known = request.num_prefilled, len(request.token_ids)
        count = min(budget, num_known - start)
        request.num_prefilled += count
        samples = request.num_prefilled == num_known
        plan.chunks.append(Chunk(request, request.slot, start, count, samples))
        block_size = epoch.blocks.block_size
        plan.digests.update(request.block_digests[start // block_size : request.num_prefilled // block_size])
        if samples:
            epoch.prefilling.remove(request)
            if request.constraint is None:
                epoch.joining.append(request)
            else:
                self._sample_under_mask(epoch, plan, request)
        self._pool.counters.prefill_tokens += count
        return count

    # --- decode --------------------------------------------------------------------------------------------------

    def _decode(self, epoch: Epoch, plan: StepPlan) -> bool:
        """Plan a step, or several, of the whole decode set; returns whether a request was preempted for it."""
        masked = self._join_masked(epoch)
        iterations = self._iterations(epoch)
        any_preempted = False
        slots, lacking = epoch.decode_set.blocks_short(epoch.blocks.table_lens, epoch.blocks.block_size, iterations)
        short = [(epoch.running[slot], count) for slot, count in zip(slots.tolist(), lacking.tolist(), strict=True)]
        for request, count in sorted(short, key=lambda pair: pair[0].arrival):
            for _ in range(count):
                any_preempted |= self._append_block(epoch, plan, request)
        if epoch.decode_set:
            plan.iterations = iterations
        for request in masked:
            if request.slot is not None:
                self._sample_under_mask(epoch, plan, request)
        return any_preempted

    def _awaits_masks(self, epoch: Epoch) -> bool:
        """Whether the next plan should be a little later, and hold requests whose masks are being computed.

        Only where all of it is decode steps, and the plans in flight keep the device busy until the masks are there.
        """
        if not epoch.decode_set or not epoch.num_plans_in_flight or self._pool.waiting or epoch.prefilling:
            return False
        is_due = any(request.mask is None for request in epoch.constrained)
        return is_due and self._pool.mask_latency_ns < epoch.decode_step_ns / 2

    def _join_masked(self, epoch: Epoch) -> list[Request]:
        """Let the constrained requests decode whose last token and next mask are known; returns them.

        Where there are no others, and no prompts come, they wait for each other: two half plans take longer than one.
        """
        ready = [
            request
            for request, num_known in epoch.constrained.items()
            if request.mask is not None and len(request.token_ids) > num_known
        ]
        if not epoch.decode_set and epoch.stalled_since is None and len(ready) < len(epoch.constrained):
            return []
        for request in ready:
            epoch.decode_set.join(request, len(request.token_ids) - 1)
        return ready

    def _sample_under_mask(self, epoch: Epoch, plan: StepPlan, request: Request) -> None:
        """The plan samples the token after the known ones; unless it is the last one, another mask will follow."""
        plan.sample_under_mask(request)
        if len(request.token_ids) + 1 < request.max_total_tokens:
            epoch.constrained[request] = len(request.token_ids)
        else:
            epoch.constrained.pop(request, None)

    def _append_block(self, epoch: Epoch, plan: StepPlan, request: Request) -> bool:
        """Extend the request's table by a block, preempting the last come until one is free.

        The oldest running request is never preempted, so that somebody always reaches the end.
        """
        any_preempted = False
        while request.slot is not None:
            block = epoch.blocks.append(request.slot)
            if block is not None:
                plan.append_slots.append(request.slot)
                plan.append_blocks.append(block)
                break
            self._pool.preempt(max(epoch.running.values(), key=lambda other: other.arrival))
            any_preempted = True
        return any_preempted

    def _iterations(self, epoch: Epoch) -> int:
        """Decode steps for one plan: several only while nothing waits, blocks suffice and the steps are short.

        A mask holds for one step, and requests that wait for theirs would wait for all steps of a plan.
        """
        if self._pool.waiting or epoch.prefilling or epoch.constrained or not epoch.decode_step_ns:
            return 1
        iterations = int(MAX_ITERATED_NS / epoch.decode_step_ns)
        iterations = min(iterations, MAX_ITERATIONS, epoch.decode_set.min_remaining())
        if iterations <= 1:
            return 1
        _, lacking = epoch.decode_set.blocks_short(epoch.blocks.table_lens, epoch.blocks.block_size, iterations)
        return iterations if int(lacking.sum()) <= epoch.blocks.num_free_blocks else 1

    # --- trials --------------------------------------------------------------------------------------------------

    def _end_trial(self, epoch: Epoch) -> None:
        """Put back who ran alone, once that has brought a token: the executor outlived it, and others come first."""
        request = epoch.on_trial
        if request is None or epoch.num_plans_in_flight or request in epoch.prefilling:
            return
        epoch.on_trial = None
        if request.state is RequestState.RUNNING:
            self._pool.put_back(request)

    def _try_alone(self, epoch: Epoch, now: float) -> StepPlan | None:
        """A plan for one request that executors may have died of, and for nobody else, up to its next token."""
        request = epoch.on_trial
        plan = StepPlan(epoch.next_step_id)
        if request is None:
            request = next((one for one in self._pool.quarantine if self._can_seat(epoch, one)), None)
            if request is None:
                return None
            del self._pool.quarantine[request]
            epoch.on_trial = request
            extend_digests(request.block_digests, request.token_ids, epoch.blocks.block_size, request.cache_salt)
            self._seat(epoch, plan, request, [], now)
        if request not in epoch.prefilling:
            return None
        self._add_chunk(epoch, plan, request, epoch.limits.max_tokens_per_step)
        return self._send(epoch, plan, now)
