"""An executor that runs one plan after the other, at once, for tests of the core without gRPC.

Its next token is a checksum of every token before it, so that `continuation` tells what a request must get, whatever
happened to it on the way; `row_logprobs` does the same for log-probabilities. It asserts what an executor may rely on:
free slots, room in the block tables, chunks without gaps, the token budget, and that nothing decodes past its length.
"""

import dataclasses
import zlib
from array import array
from collections.abc import Iterable

import numpy as np

from protos.duet.executor.v1 import executor_pb2 as pb
from scheduler_service.core.epoch import ExecutorLimits

VOCAB_SIZE = 1000
CONTINUES, STOP, LENGTH, CANCELLED = 0, 1, 2, 3


def continuation(prompt: Iterable[int], num_tokens: int, choice_index: int = 0) -> list[int]:
    """The `num_tokens` tokens that follow a prompt: each is the checksum of all before it, begun with the choice."""
    checksum, token_ids = zlib.crc32(array("i", prompt).tobytes(), choice_index), list[int]()
    for _ in range(num_tokens):
        token_ids.append(checksum % VOCAB_SIZE)
        checksum = zlib.crc32(array("i", token_ids[-1:]).tobytes(), checksum)
    return token_ids


@dataclasses.dataclass(frozen=True)
class RowLogprobs:
    """Log-probabilities at one position."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int


def row_logprobs(position: int, token: int, width: int) -> RowLogprobs:
    """What the fake tells of a token at a position: unlike those of any token or position nearby."""
    token_ids = [token, *((token + 7 * k + position) % VOCAB_SIZE for k in range(1, width))]
    return RowLogprobs(token_ids, [-(position + k / 32) for k in range(width)], 1 + (token + position) % 50)


@dataclasses.dataclass
class Slot:
    """A sequence on the fake device."""

    prompt: list[int]
    num_logprobs: int
    num_prompt_logprobs: int
    num_tokens: int
    num_computed: int
    num_blocks: int
    max_total_tokens: int
    stops: frozenset[int]
    checksum: int
    reason: int = CONTINUES


class FakeExecutor:
    """Runs one plan after the other, at once."""

    def __init__(self, limits: ExecutorLimits) -> None:
        self.limits = limits
        self.slots: dict[int, Slot] = {}
        self.decode_set: dict[int, None] = {}
        self.failing: set[int] = set()  # slots that fail the next time they are computed
        self.device_time_ns = 0

    def run(self, plan: pb.StepPlan) -> list[pb.StepResult]:
        for slot in _ints(plan.release_slots):
            del self.slots[slot]
            self.decode_set.pop(slot, None)
        for sequence in plan.new_sequences:
            self._seat(sequence)
        for slot in _ints(plan.append_slots):
            self.slots[slot].num_blocks += 1
        counts = _ints(plan.prefill_counts)
        chunks = zip(
            _ints(plan.prefill_slots), _ints(plan.prefill_starts), counts, _ints(plan.prefill_samples), strict=True
        )
        self.prompt_logprobs: list[pb.PromptLogprobs] = []  # of this plan; they leave with its first result
        sampled = [slot for slot, start, count, samples in chunks if self._prefill(slot, start, count, samples)]
        for slot in _ints(plan.leave_slots):
            del self.decode_set[slot]
        self.decode_set.update(dict.fromkeys(_ints(plan.join_slots)))
        words = np.frombuffer(plan.masks, dtype="<u4").reshape(-1, -(-VOCAB_SIZE // 32))
        self.masks = dict(zip(_ints(plan.mask_slots), words, strict=True))  # of this plan
        assert plan.iterations <= 1 or not self.masks
        num_decoding = len(self.decode_set) if plan.iterations else 0
        assert 0 < sum(counts) + num_decoding <= self.limits.max_tokens_per_step
        if not plan.iterations:
            return [self._sample(plan, 0, sampled)]
        results = [self._sample(plan, 0, sampled, partial=True)] if sampled else []
        return results + [self._decode(plan, index) for index in range(plan.iterations)]

    def next_token(self, sequence: Slot) -> int:
        return sequence.checksum % VOCAB_SIZE

    def _seat(self, sequence: pb.NewSequence) -> None:
        token_ids, num_blocks = _ints(sequence.token_ids), len(_ints(sequence.block_ids))
        assert sequence.slot not in self.slots, "the slot is taken"
        assert sequence.num_cached_tokens < len(token_ids) <= num_blocks * self.limits.block_size
        if sequence.sampling.num_prompt_logprobs:
            assert sequence.num_cached_tokens == 0, "a position of the prompt would not be computed"
        self.slots[sequence.slot] = Slot(
            prompt=token_ids[: sequence.num_prompt_tokens],
            num_logprobs=sequence.sampling.num_logprobs,
            num_prompt_logprobs=sequence.sampling.num_prompt_logprobs,
            num_tokens=len(token_ids),
            num_computed=sequence.num_cached_tokens,
            num_blocks=num_blocks,
            max_total_tokens=sequence.max_total_tokens,
            stops=frozenset(_ints(sequence.stop_token_ids)),
            checksum=zlib.crc32(sequence.token_ids, sequence.sampling.choice_index),
        )

    def _prefill(self, slot: int, start: int, count: int, samples: int) -> bool:
        sequence = self.slots[slot]
        assert start == sequence.num_computed, "a chunk leaves a gap"
        sequence.num_computed += count
        assert bool(samples) == (sequence.num_computed == sequence.num_tokens)
        end, width = min(start + count + 1, len(sequence.prompt)), sequence.num_prompt_logprobs
        if width and start + 1 < end:
            rows = [row_logprobs(position, sequence.prompt[position], width) for position in range(start + 1, end)]
            token_ids, logprobs, ranks = _logprob_columns(rows)
            self.prompt_logprobs.append(
                pb.PromptLogprobs(slot=slot, start=start + 1, token_ids=token_ids, logprobs=logprobs, ranks=ranks)
            )
        return bool(samples) or slot in self.failing

    def _decode(self, plan: pb.StepPlan, index: int) -> pb.StepResult:
        assert all(self.slots[slot].reason != LENGTH for slot in self.decode_set), "decodes past max_tokens"
        living = [slot for slot in self.decode_set if not self.slots[slot].reason]
        for slot in living:
            sequence = self.slots[slot]
            sequence.num_computed += 1
            assert sequence.num_computed == sequence.num_tokens <= sequence.num_blocks * self.limits.block_size
        return self._sample(plan, index, living)

    def _sample(self, plan: pb.StepPlan, index: int, slots: list[int], *, partial: bool = False) -> pb.StepResult:
        failed = [slot for slot in slots if slot in self.failing]
        self.failing.difference_update(failed)
        rows: list[tuple[int, int, int]] = []
        logprobs: list[RowLogprobs] = []
        for slot in slots:
            sequence = self.slots[slot]
            if slot in failed:
                sequence.reason = STOP
                continue
            token = self.next_token(sequence)
            if slot in self.masks:
                allowed = np.flatnonzero(np.unpackbits(self.masks.pop(slot).view(np.uint8), bitorder="little"))
                token = int(allowed[sequence.checksum % len(allowed)])
            if sequence.num_logprobs:
                logprobs.append(row_logprobs(sequence.num_tokens, token, sequence.num_logprobs))
            sequence.checksum = zlib.crc32(array("i", [token]).tobytes(), sequence.checksum)
            sequence.num_tokens += 1
            if token in sequence.stops:
                sequence.reason = STOP
            elif sequence.num_tokens == sequence.max_total_tokens:
                sequence.reason = LENGTH
            rows.append((slot, token, sequence.reason))
        columns = np.array(rows, dtype="<i4").reshape(-1, 3)
        logprob_columns = _logprob_columns(logprobs)
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, []
        return pb.StepResult(
            epoch=plan.epoch,
            step_id=plan.step_id + index,
            partial=partial,
            slots=columns[:, 0].tobytes(),
            token_ids=columns[:, 1].tobytes(),
            finish_reasons=columns[:, 2].tobytes(),
            slot_errors=[pb.SlotError(slot=slot, message="out of range") for slot in failed],
            device_time_ns=self.device_time_ns,
            logprob_token_ids=logprob_columns[0],
            logprobs=logprob_columns[1],
            logprob_ranks=logprob_columns[2],
            prompt_logprobs=prompt_logprobs,
        )


def _logprob_columns(rows: list[RowLogprobs]) -> tuple[bytes, bytes, bytes]:
    """Token ids, log-probabilities and ranks as columns."""
    token_ids = [token_id for row in rows for token_id in row.token_ids]
    logprobs = [logprob for row in rows for logprob in row.logprobs]
    ranks = [row.rank for row in rows]
    return (
        np.array(token_ids, dtype="<i4").tobytes(),
        np.array(logprobs, dtype="<f4").tobytes(),
        np.array(ranks, dtype="<i4").tobytes(),
    )


def _ints(column: bytes) -> list[int]:
    return np.frombuffer(column, dtype="<i4").tolist()
