"""How the ranks of a tensor-parallel group write into each other's memory: small values, and the all-reduce of layers.

A word is 64 bits: a value of 32 and the number of the exchange that it belongs to. A GPU writes and reads 64 bits at
once, so a word with the awaited number holds the awaited value: there is neither a flag nor a fence nor a barrier, and
an exchange takes one way over the link. A mailbox has two entries, used in turn: whoever has exchange n + 1 of a peer
knows that the peer has read exchange n, and may overwrite that with n + 2. Numbers are counted on the device, so that
graphs can be replayed; a mailbox's are the same on all ranks, and they may wrap.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD_BYTES = 8
_BLOCK = 512  # values that a program of the all-reduce sums
_WARPS = 4  # fewer threads than values: none of them is read by two
_MAX_REGISTERS = 128  # a thread
_PROGRAMS_PER_SM = 4  # that the registers allow, so that all programs run at the same time
_COLUMNS = tl.constexpr(4)  # words of a rank in an entry of `all_gather`, 3 of them used
GATHER_WORDS = tl.constexpr(2 * _COLUMNS.value)  # of a mailbox of `all_gather`, for each rank


@dataclasses.dataclass(frozen=True)
class PeerMemory:
    """As many words on each rank's device, zeros at first, that all ranks address. Whoever made it keeps it alive."""

    rank: int
    addresses: Tensor  # [num_ranks] int64, on this rank's device: where each rank's words begin, multiples of 16
    num_words: int

    @property
    def num_ranks(self) -> int:
        """In the group."""
        return len(self.addresses)


@dataclasses.dataclass(frozen=True)
class OneShotAllReduce:
    """All-reduce of small tensors in one kernel: a program sends its part to all ranks, then sums what they sent.

    Sums in float32 and in the order of ranks, so that the results are the same bits on all ranks. On all ranks the same
    calls must be made in the same order.
    """

    memory: PeerMemory
    numbers: Tensor  # [max_blocks] int32, on the device: exchanges so far of each block of values
    max_programs: int

    @staticmethod
    def num_words(num_ranks: int, max_bytes: int) -> int:
        """That `memory` must have for tensors of up to max_bytes."""
        return 2 * num_ranks * -(-max_bytes // (4 * _BLOCK)) * _BLOCK

    @classmethod
    def make(cls, memory: PeerMemory) -> "OneShotAllReduce":
        """For the largest tensors that `memory` has room for."""
        device = memory.addresses.device
        num_blocks = memory.num_words // (2 * memory.num_ranks * _BLOCK)
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return cls(memory, torch.zeros(num_blocks, dtype=torch.int32, device=device), sms * _PROGRAMS_PER_SM)

    def takes(self, x: Tensor) -> bool:
        """Whether `all_reduce` can be called with x, which depends on its size, its dtype and where it begins."""
        num_bytes = x.numel() * x.element_size()
        return (
            x.dtype in (torch.float32, torch.bfloat16)
            and x.is_contiguous()
            and 0 < num_bytes <= 4 * _BLOCK * len(self.numbers)
            and num_bytes % 4 == 0
            and x.data_ptr() % 4 == 0
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place. x: float32 or bfloat16, see `takes`."""
        assert self.takes(x), f"{tuple(x.shape)} of {x.dtype}"
        values = x.view(-1).view(torch.int32)
        memory = self.memory
        _all_reduce_kernel[(min(triton.cdiv(len(values), _BLOCK), self.max_programs),)](
            values, len(values), memory.addresses, self.numbers, RANK=memory.rank, WORLD=memory.num_ranks,
            CAPACITY=_BLOCK * len(self.numbers), IS_BFLOAT16=x.dtype == torch.bfloat16, BLOCK=_BLOCK, num_warps=_WARPS,
            maxnreg=_MAX_REGISTERS,
        )  # fmt: skip
        return x


@triton.jit
def _all_reduce_kernel(
    values, num_values, addresses, numbers, RANK: tl.constexpr, WORLD: tl.constexpr, CAPACITY: tl.constexpr,
    IS_BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values: [num_values] int32, the bits of float32 or of two bfloat16."""
    num_blocks = tl.cdiv(num_values, BLOCK)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        number = tl.load(numbers + block) + 1
        index = block * BLOCK + tl.arange(0, BLOCK)
        own = tl.load(values + index, mask=index < num_values, other=0)
        place = (number & 1) * (WORLD * CAPACITY) + RANK * CAPACITY + index
        for step in tl.static_range(1, WORLD):
            words = mailboxes(addresses, (RANK + step) % WORLD) + place
            tl.store(words, tagged(own, number), mask=index < num_values)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        number = tl.load(numbers + block) + 1
        index = block * BLOCK + tl.arange(0, BLOCK)
        own = tl.load(values + index, mask=index < num_values, other=0)
        place = mailboxes(addresses, RANK) + (number & 1) * (WORLD * CAPACITY) + index
        first = tl.zeros([BLOCK], tl.float32)
        second = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(WORLD):
            if rank == RANK:
                value = own
            else:
                value = _receive(place + rank * CAPACITY, index < num_values, number)
            if IS_BFLOAT16:
                first += (value << 16).to(tl.float32, bitcast=True)
                second += (value >> 16 << 16).to(tl.float32, bitcast=True)
            else:
                first += value.to(tl.float32, bitcast=True)
        if IS_BFLOAT16:
            low = first.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
            high = second.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
            total = (low | (high << 16)).to(tl.int32, bitcast=True)
        else:
            total = first.to(tl.int32, bitcast=True)
        tl.store(values + index, total, mask=index < num_values)
        tl.store(numbers + block, number)


@triton.jit
def mailboxes(addresses, rank):
    """Where a rank's words begin."""
    return tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def tagged(values, number):
    """Words of int32 values in an exchange."""
    return (number.to(tl.int64) << 32) | values.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _receive(places, mask, number):
    """The values of an exchange, as soon as all are there; only where no two threads hold the same element."""
    words = tl.load(places, mask=mask, other=0, volatile=True)
    while tl.max((mask & ((words >> 32) != number)).to(tl.int32)) > 0:
        words = tl.load(places, mask=mask, other=0, volatile=True)
    return words.to(tl.int32)


@triton.jit
def wait(places, mask, number):
    """Go on when all words are of exchange `number`.

    They must be read again behind this: where several threads hold an element, some may have seen an older word.
    """
    missing = 1
    while missing > 0:
        words = tl.load(places, mask=mask, other=0, volatile=True)
        missing = tl.max((mask & ((words >> 32) != number)).to(tl.int32))
    tl.debug_barrier()


@triton.jit
def read(places, mask, other):
    """The values of words that are there; other: an int32."""
    return tl.load(places, mask=mask, other=other, volatile=True).to(tl.int32)


@triton.jit
def all_gather(first, second, third, addresses, start, number, RANK: tl.constexpr, WORLD: tl.constexpr):
    """Three int32 scalars of every rank, [RANKS] each, RANKS the power of 2 from WORLD on; zeros behind WORLD.

    start: of the mailbox; number: of the exchange.
    """
    column = tl.arange(0, _COLUMNS)
    own = tl.where(column == 0, first, tl.where(column == 1, second, third))
    entry = start + (number & 1) * (WORLD * _COLUMNS)
    tl.debug_barrier()  # a thread that still reads the exchange before could miss it behind this
    for step in tl.static_range(WORLD):
        places = mailboxes(addresses, (RANK + step) % WORLD) + entry + RANK * _COLUMNS + column
        tl.store(places, tagged(own, number))
    rank = tl.arange(0, triton.next_power_of_2(WORLD))
    places = mailboxes(addresses, RANK) + entry + (rank * _COLUMNS)[:, None] + column[None, :]
    mask = (rank < WORLD)[:, None] & (column < _COLUMNS)[None, :]
    wait(places, mask, number)
    place = mailboxes(addresses, RANK) + entry + rank * _COLUMNS
    is_rank = rank < WORLD
    return read(place, is_rank, 0), read(place + 1, is_rank, 0), read(place + 2, is_rank, 0)
