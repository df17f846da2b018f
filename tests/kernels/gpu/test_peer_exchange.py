"""What ranks compute together is what one device computes, and the same bits on all of them."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.gpu.peer_all_reduce import AllReduceLimits, PeerAllReduce
from kernels.gpu.peer_exchange import PeerMemory
from kernels.gpu.sampler import Tuning, Workspace, sample
from kernels.gpu.sampler_shard import Shard
from kernels.gpu.step_rings import FAILED
from tests.kernels.gpu import peer_ranks
from tests.kernels.gpu.test_gpu_sampler import ROWS, SMALL, by_reference, make_logits, make_state, row_slots_of, run

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.timeout(300)]
VOCAB_SIZE = 900
NUM_RANKS = 2
LIMITS = AllReduceLimits(one_shot=64 << 10, norm_one_shot=16 << 10, norm_two_shot=64 << 10)
ROW_SIZES = ((1, 1024), (9, 2048), (2, 3072), (5, 1024), (3, 4096), (7, 3072), (2, 4096))  # by one shot and by two
EPS = 1e-6
SIZES = ((2, 64), (9, 300), (1, 2), (40, 260), (3, 1024))  # in an order that uses blocks more and less often


@dataclasses.dataclass(frozen=True)
class AllReduce:
    """Several sums, one after the other."""

    dtype: torch.dtype
    num_ranks: int = NUM_RANKS

    @property
    def num_words(self) -> int:
        return PeerAllReduce.num_words(self.num_ranks, LIMITS)

    def inputs(self, rank: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(rank)
        return [torch.randn(size, generator=generator).to(self.dtype) for size in SIZES]

    def prepare(self, memory: PeerMemory) -> Callable[[], list[Tensor]]:
        through_peers = PeerAllReduce.make(memory, LIMITS)
        inputs = [x.to(memory.addresses.device) for x in self.inputs(memory.rank)]
        return lambda: [through_peers.all_reduce(x) for x in inputs]


@dataclasses.dataclass(frozen=True)
class AllReduceNorm:
    """Sums with a residual and their norms, between other sums, which use the same blocks more or less often."""

    num_ranks: int = NUM_RANKS

    @property
    def num_words(self) -> int:
        return PeerAllReduce.num_words(self.num_ranks, LIMITS)

    def inputs(self, rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """x, residual and weight; the latter two are the same on all ranks."""
        own, shared = torch.Generator().manual_seed(rank), torch.Generator().manual_seed(100)
        return [
            (
                torch.randn(size, generator=own).bfloat16(),
                torch.randn(size, generator=shared).bfloat16(),
                torch.randn(size[1], generator=shared).bfloat16(),
            )
            for size in ROW_SIZES
        ]

    def prepare(self, memory: PeerMemory) -> Callable[[], list[tuple[Tensor, Tensor]]]:
        through_peers, device = PeerAllReduce.make(memory, LIMITS), memory.addresses.device
        inputs = [tuple(part.to(device) for part in parts) for parts in self.inputs(memory.rank)]

        def launch() -> list[tuple[Tensor, Tensor]]:
            results = []
            for x, residual, weight in inputs:
                results.append((through_peers.all_reduce_norm(x, residual, weight, EPS), residual))
                through_peers.all_reduce(x[:1].clone())
            return results

        return launch


@dataclasses.dataclass(frozen=True)
class Sample:
    """A row for each kind of request, sampled at a few positions."""

    name: str
    rows: tuple[dict, ...]
    shape: str = "normal"
    dtype: torch.dtype = torch.bfloat16
    vocab_size: int = VOCAB_SIZE
    span: int = 512  # a whole tile, as on one device
    num_candidates: int = 64
    broken: tuple[tuple[int, int], ...] = ()  # row and token of logits that are not finite
    dead: tuple[int, ...] = ()  # rows without a slot, at the second position
    num_positions: int = 1
    tuning: Tuning | None = SMALL
    num_ranks: int = NUM_RANKS

    @property
    def min_tile(self) -> int:
        return self.tuning.tile if self.tuning else 1024

    @property
    def num_words(self) -> int:
        return Shard.num_words(self.num_ranks, self.span, len(self.rows), self.min_tile)

    def logits(self, device: torch.device) -> Tensor:
        logits = make_logits(self.shape, len(self.rows), self.vocab_size, self.dtype, device)
        for row, token in self.broken:
            logits[row, token] = float("nan")
        return logits

    def positions(self, step: int) -> list[int]:
        return [3 + 7 * index + step for index in range(len(self.rows))]

    def row_slots(self, step: int, device: torch.device) -> Tensor:
        row_slots = row_slots_of(list(self.rows), device)
        if step == 1:
            row_slots[list(self.dead)] = -1
        return row_slots

    def prepare(self, memory: PeerMemory) -> Callable[[], list[tuple[Tensor, Tensor]]]:
        device = memory.addresses.device
        first = memory.rank * self.span
        logits = self.logits(device)[:, first : first + self.span]
        shard = Shard.make(self.vocab_size, self.span, len(self.rows), memory, self.min_tile)
        workspace = Workspace.empty(
            len(self.rows), self.vocab_size, self.dtype, device, self.min_tile, self.num_candidates, shard
        )
        state = make_state(list(self.rows), device)
        steps = [
            (self.row_slots(step, device), torch.tensor(self.positions(step), dtype=torch.int32, device=device))
            for step in range(self.num_positions)
        ]
        return lambda: [sample(logits, slots, state, at, workspace, self.tuning) for slots, at in steps]


GREEDY, FREE, CUT = {"temperature": 0.0}, {"temperature": 1.3, "seed": 3}, {"top_k": 40, "top_p": 0.8, "temperature": 4}
SAMPLES = [
    *(Sample(name, tuple(rows)) for name, rows in ROWS.items()),
    Sample("one position after the other", (FREE, CUT), num_positions=5),
    Sample("few values", tuple(ROWS["all"]), "few values"),
    Sample("equal", (GREEDY, FREE, CUT), "equal", torch.float32),
    Sample("float32", (FREE, CUT, {"top_p": 0.9}), dtype=torch.float32),
    Sample("no room for candidates", tuple(ROWS["all"]), num_candidates=1),
    Sample("ragged spans", (GREEDY, FREE, CUT), vocab_size=901, span=451),
    Sample("an empty rank", (GREEDY, FREE, CUT), vocab_size=500),
    Sample("not finite", (GREEDY, FREE, CUT, CUT), broken=((0, 3), (1, 899), (2, 700))),
    Sample("dead rows", (GREEDY, FREE, CUT), dead=(0, 2), num_positions=4),
]
REAL_ROWS = tuple(row | {"seed": index} for index, row in enumerate(itertools.chain(*(list(ROWS.values()) * 3))))
REAL = [
    Sample(
        f"a real vocabulary, {num_rows} rows", REAL_ROWS[:num_rows], vocab_size=151_936, span=77_824, tuning=None,
        num_candidates=4096, num_positions=8,
    )
    for num_rows in (3, 20, 70)
]  # fmt: skip
ALL_REDUCES = [AllReduce(torch.bfloat16), AllReduce(torch.float32)]


@pytest.fixture(scope="module", params=["cpu", "streams", "gpus"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    place, num_gpus = request.param, torch.cuda.device_count()
    if (place == "cpu") != (num_gpus == 0) or (place == "gpus" and num_gpus < NUM_RANKS):
        pytest.skip(f"{num_gpus} GPUs")
    samples = [*SAMPLES, *(REAL if num_gpus else [])]
    num_ranks = 2 if place == "gpus" and num_gpus == 2 else 3  # of two the order does not show
    all_reduces = [dataclasses.replace(case, num_ranks=num_ranks) for case in (*ALL_REDUCES, AllReduceNorm())]
    found = {}
    for cases in (samples, all_reduces):
        directory: Path = tmp_path_factory.mktemp("ranks")
        found |= zip(cases_keys(cases), peer_ranks.run(cases, place, directory), strict=True)
    return found


def cases_keys(cases) -> list[str]:
    return [case.name if isinstance(case, Sample) else str(getattr(case, "dtype", "norm")) for case in cases]


@pytest.mark.parametrize("case", [*SAMPLES, *REAL], ids=cases_keys([*SAMPLES, *REAL]))
def test_ranks_choose_the_token_of_one_device(case: Sample, results, device):
    if case.name not in results:
        pytest.skip("too slow in the interpreter")
    first, *others = results[case.name]
    for step, (token_ids, logprobs) in enumerate(first):
        for other in others:
            assert torch.equal(other[step][0], token_ids)
            assert torch.equal(other[step][1], logprobs)
        rows, positions = list(case.rows), case.positions(step)
        alone, alone_logprobs = run(
            case.logits(device), rows, positions, case.tuning, case.num_candidates, case.row_slots(step, device)
        )
        assert token_ids.cpu().tolist() == alone.tolist()
        torch.testing.assert_close(logprobs.cpu(), alone_logprobs, rtol=1e-5, atol=1e-5)
        if case.tuning is not None and not case.broken and not (case.dead and step == 1):
            assert token_ids.cpu().tolist() == by_reference(case.logits(device), rows, positions).tolist()
    assert all((returned == FAILED.value).sum() == len(case.broken) for returned, _ in first)


@pytest.mark.parametrize("case", ALL_REDUCES, ids=cases_keys(ALL_REDUCES))
def test_all_reduce_sums_in_float32_and_in_the_order_of_ranks(case: AllReduce, results):
    by_rank = results[str(case.dtype)]
    for index, inputs in enumerate(zip(*(case.inputs(rank) for rank in range(len(by_rank))), strict=True)):
        total = torch.zeros_like(inputs[0], dtype=torch.float32)
        for x in inputs:
            total += x.float()
        for returned in by_rank:
            assert torch.equal(returned[index], by_rank[0][index])
        # The interpreter truncates where a GPU rounds.
        is_exact = case.dtype == torch.float32 or torch.cuda.is_available()
        tolerance = 0 if is_exact else 2**-7
        torch.testing.assert_close(by_rank[0][index].cpu(), total.to(case.dtype), rtol=tolerance, atol=0)


def test_all_reduce_with_a_norm_is_the_sum_then_the_norm(results):
    by_rank = results["norm"]
    for index, parts in enumerate(zip(*(AllReduceNorm().inputs(rank) for rank in range(len(by_rank))), strict=True)):
        total = torch.zeros_like(parts[0][0], dtype=torch.float32)
        for x, _, _ in parts:
            total += x.float()
        _, residual, weight = parts[0]
        norm, summed = reference.add_rms_norm(total.bfloat16(), residual, weight, EPS)
        for rank_norm, rank_summed in (returned[index] for returned in by_rank):
            assert torch.equal(rank_norm, by_rank[0][index][0])
            assert torch.equal(rank_summed, by_rank[0][index][1])
            if torch.cuda.is_available():
                assert torch.equal(rank_summed.cpu(), summed)
            # The interpreter truncates where a GPU rounds.
            torch.testing.assert_close(rank_summed.cpu(), summed, rtol=2**-6, atol=2**-5)
            torch.testing.assert_close(rank_norm.cpu(), norm, rtol=2**-5, atol=2**-5)


def limited(limits: AllReduceLimits) -> PeerAllReduce:
    memory = PeerMemory(0, torch.zeros(2, dtype=torch.int64), PeerAllReduce.num_words(2, limits))
    return PeerAllReduce.make(memory, limits)


def test_all_reduce_with_a_norm_takes_rows_of_whole_blocks():
    through_peers = limited(AllReduceLimits(one_shot=0, norm_one_shot=4096, norm_two_shot=16384))
    assert through_peers.takes_rows(torch.zeros((8, 1024), dtype=torch.bfloat16))
    assert not through_peers.takes_rows(torch.zeros((9, 1024), dtype=torch.bfloat16))
    assert not through_peers.takes_rows(torch.zeros((2, 1536), dtype=torch.bfloat16))
    assert not through_peers.takes_rows(torch.zeros((2, 1024)))
    assert not through_peers.takes(torch.zeros((2, 1024), dtype=torch.bfloat16))


def test_all_reduce_takes_what_it_has_room_for():
    through_peers = limited(AllReduceLimits(one_shot=4096, norm_one_shot=0, norm_two_shot=0))
    assert through_peers.takes(torch.zeros(2048, dtype=torch.bfloat16))
    assert not through_peers.takes(torch.zeros(2050, dtype=torch.bfloat16))
    assert not through_peers.takes(torch.zeros(3, dtype=torch.bfloat16))
    assert not through_peers.takes(torch.zeros(8, dtype=torch.float64))
    assert not through_peers.takes(torch.zeros(8, 8).T[:4])
    assert not through_peers.takes(torch.zeros(0))
