"""How the ranks of a tensor-parallel group write into each other's memory.

A word is 64 bits: a value of 32 and the number of the exchange that it belongs to. A GPU writes and reads 64 bits at
once, so a word with the awaited number holds the awaited value: there is neither a flag nor a fence nor a barrier, and
an exchange takes one way over the link. A mailbox has two entries, used in turn: whoever has exchange n + 1 of a peer
knows that the peer has read exchange n, and may overwrite that with n + 2. Numbers are counted on the device, so that
graphs can be replayed; a mailbox's are the same on all ranks, and they may wrap.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def mailboxes(addresses, rank):
    """Where a rank's words begin."""
    return tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def tagged(values, number):
    """Words of int32 values in an exchange."""
    return (number.to(tl.int64) << 32) | values.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def receive(places, mask, number):
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
