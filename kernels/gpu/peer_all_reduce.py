"""All-reduce through peer memory, alone or with the norm that follows it in a decoder layer.

In one shot each rank sends its part to all others, and each sums what they sent. In two, rows belong to ranks in turn:
a row's owner alone receives and sums its parts, and sends the sum to all others. That is half the traffic of one shot
on 4 ranks, a quarter on 8, for twice the latency. Sums are in float32 and in the order of ranks, then rounded: the same
bits on all ranks, either way, with or without the norm.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.peer_exchange import PeerMemory, mailboxes, receive, tagged

_BLOCK = 512  # values of 32 bits that share a number
_WARPS = 4  # fewer threads than values: none of them is read by two
_MAX_REGISTERS = 128  # a thread
_WARPS_PER_SM = 16  # that the registers allow, so that all programs run at the same time


@dataclasses.dataclass(frozen=True)
class AllReduceLimits:
    """Bytes up to which a tensor takes each way; above them there are others."""

    one_shot: int
    norm_one_shot: int
    norm_two_shot: int  # above norm_one_shot

    @property
    def most(self) -> int:
        """Bytes of the largest tensor."""
        return max(self.one_shot, self.norm_one_shot, self.norm_two_shot)


@dataclasses.dataclass(frozen=True)
class PeerAllReduce:
    """On all ranks the same calls must be made in the same order, with tensors of the same sizes."""

    memory: PeerMemory
    limits: AllReduceLimits
    numbers: Tensor  # [max_blocks] int32, on the device: exchanges so far of each block of values
    max_warps: int

    @staticmethod
    def num_words(num_ranks: int, limits: AllReduceLimits) -> int:
        """That `memory` must have."""
        return 2 * num_ranks * _num_blocks(limits.most) * _BLOCK

    @classmethod
    def make(cls, memory: PeerMemory, limits: AllReduceLimits) -> "PeerAllReduce":
        """`memory` is used for nothing else."""
        device = memory.addresses.device
        assert memory.num_words >= cls.num_words(memory.num_ranks, limits)
        numbers = torch.zeros(_num_blocks(limits.most), dtype=torch.int32, device=device)
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return cls(memory, limits, numbers, sms * _WARPS_PER_SM)

    def takes(self, x: Tensor) -> bool:
        """Whether `all_reduce` can be called with x, which depends on its size, its dtype and where it begins."""
        return x.dtype in (torch.float32, torch.bfloat16) and self._fits(x, self.limits.one_shot)

    def takes_rows(self, x: Tensor) -> bool:
        """Whether `all_reduce_norm` can be called with x: rows of bfloat16 that are made of whole blocks."""
        most = max(self.limits.norm_one_shot, self.limits.norm_two_shot)
        return x.dtype == torch.bfloat16 and x.shape[1] % (2 * _BLOCK) == 0 and self._fits(x, most)

    def _fits(self, x: Tensor, max_bytes: int) -> bool:
        num_bytes = x.numel() * x.element_size()
        return x.is_contiguous() and 0 < num_bytes <= max_bytes and num_bytes % 4 == 0 and x.data_ptr() % 4 == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place. x: float32 or bfloat16, see `takes`."""
        assert self.takes(x), f"{tuple(x.shape)} of {x.dtype}"
        values = x.view(-1).view(torch.int32)
        memory = self.memory
        _all_reduce_kernel[(min(triton.cdiv(len(values), _BLOCK), self.max_warps // _WARPS),)](
            values, len(values), memory.addresses, self.numbers, RANK=memory.rank, WORLD=memory.num_ranks,
            CAPACITY=_BLOCK * len(self.numbers), IS_BFLOAT16=x.dtype == torch.bfloat16, BLOCK=_BLOCK, num_warps=_WARPS,
            maxnreg=_MAX_REGISTERS,
        )  # fmt: skip
        return x

    def all_reduce_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`all_reduce`, then `norm.add_rms_norm`, in one kernel; x stays as it is.

        x, residual: [n, size], see `takes_rows`; weight: [size]. residual becomes the sum of both, the norm of which is
        returned: [n, size].
        """
        assert self.takes_rows(x), f"{tuple(x.shape)} of {x.dtype}"
        assert residual.is_contiguous()
        memory, (num_rows, size) = self.memory, x.shape
        out = torch.empty_like(x)
        row = triton.next_power_of_2(size // 2)
        num_warps = min(max(row // 256, _WARPS), 2 * _WARPS)
        is_one_shot = x.numel() * x.element_size() <= self.limits.norm_one_shot
        kernel = _one_shot_norm_kernel if is_one_shot else _two_shot_norm_kernel
        kernel[(min(num_rows, self.max_warps // num_warps),)](
            x.view(torch.int32), residual.view(torch.int32), weight.view(torch.int32), out.view(torch.int32), num_rows,
            eps, memory.addresses, self.numbers, RANK=memory.rank, WORLD=memory.num_ranks,
            CAPACITY=_BLOCK * len(self.numbers), SIZE=size // 2, ROW=row, BLOCK=_BLOCK, num_warps=num_warps,
            maxnreg=_MAX_REGISTERS,
        )  # fmt: skip
        return out


def _num_blocks(num_bytes: int) -> int:
    return -(-num_bytes // (4 * _BLOCK))


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
        _send_to_all(own, index, index < num_values, number, addresses, RANK, WORLD, CAPACITY)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        number = tl.load(numbers + block) + 1
        index = block * BLOCK + tl.arange(0, BLOCK)
        own = tl.load(values + index, mask=index < num_values, other=0)
        total = _sum_of_all(
            own, index, index < num_values, number, addresses, RANK, WORLD, CAPACITY, IS_BFLOAT16, BLOCK
        )
        tl.store(values + index, total, mask=index < num_values)
        tl.store(numbers + block, number)


@triton.jit(do_not_specialize=["num_rows"])
def _one_shot_norm_kernel(
    x, residual, weight, out, num_rows, eps, addresses, numbers, RANK: tl.constexpr, WORLD: tl.constexpr,
    CAPACITY: tl.constexpr, SIZE: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, residual, out: [num_rows, SIZE], weight: [SIZE], int32 of two bfloat16 each. A program a row."""
    columns, mask = _columns(SIZE, ROW)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        index = row * SIZE + columns
        number = tl.load(numbers + index // BLOCK, mask=mask, other=0) + 1
        own = tl.load(x + index, mask=mask, other=0)
        _send_to_all(own, index, mask, number, addresses, RANK, WORLD, CAPACITY)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        index = row * SIZE + columns
        number = tl.load(numbers + index // BLOCK, mask=mask, other=0) + 1
        own = tl.load(x + index, mask=mask, other=0)
        total = _sum_of_all(own, index, mask, number, addresses, RANK, WORLD, CAPACITY, True, ROW)
        _finish_row(total, row, columns, mask, residual, weight, out, eps, numbers, SIZE, ROW, BLOCK)


@triton.jit(do_not_specialize=["num_rows"])
def _two_shot_norm_kernel(
    x, residual, weight, out, num_rows, eps, addresses, numbers, RANK: tl.constexpr, WORLD: tl.constexpr,
    CAPACITY: tl.constexpr, SIZE: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As _one_shot_norm_kernel. An owner's sum stands where the owner's part would in one shot."""
    columns, mask = _columns(SIZE, ROW)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        if row % WORLD != RANK:
            index = row * SIZE + columns
            number = tl.load(numbers + index // BLOCK, mask=mask, other=0) + 1
            place = _place(index, number, RANK, WORLD, CAPACITY)
            own = tl.load(x + index, mask=mask, other=0)
            tl.store(mailboxes(addresses, row % WORLD) + place, tagged(own, number), mask=mask)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        if row % WORLD == RANK:
            index = row * SIZE + columns
            number = tl.load(numbers + index // BLOCK, mask=mask, other=0) + 1
            own = tl.load(x + index, mask=mask, other=0)
            total = _sum_of_all(own, index, mask, number, addresses, RANK, WORLD, CAPACITY, True, ROW)
            _send_to_all(total, index, mask, number, addresses, RANK, WORLD, CAPACITY)
            _finish_row(total, row, columns, mask, residual, weight, out, eps, numbers, SIZE, ROW, BLOCK)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        if row % WORLD != RANK:
            index = row * SIZE + columns
            number = tl.load(numbers + index // BLOCK, mask=mask, other=0) + 1
            place = mailboxes(addresses, RANK) + _place(index, number, row % WORLD, WORLD, CAPACITY)
            total = receive(place, mask, number)
            _finish_row(total, row, columns, mask, residual, weight, out, eps, numbers, SIZE, ROW, BLOCK)


@triton.jit
def _columns(SIZE: tl.constexpr, ROW: tl.constexpr):
    """Columns of a row, and which of them exist: a literal where all do, since loads are then free of predicates."""
    columns = tl.arange(0, ROW)
    if ROW == SIZE:
        mask = tl.full([ROW], True, tl.int1)
    else:
        mask = columns < SIZE
    return columns, mask


@triton.jit
def _place(index, number, rank, WORLD: tl.constexpr, CAPACITY: tl.constexpr):
    """Where among a rank's words what `rank` sends in an exchange stands."""
    return (number & 1) * (WORLD * CAPACITY) + rank * CAPACITY + index


@triton.jit
def _send_to_all(
    values, index, mask, number, addresses, RANK: tl.constexpr, WORLD: tl.constexpr, CAPACITY: tl.constexpr
):
    place = _place(index, number, RANK, WORLD, CAPACITY)
    for step in tl.static_range(1, WORLD):
        tl.store(mailboxes(addresses, (RANK + step) % WORLD) + place, tagged(values, number), mask=mask)


@triton.jit
def _sum_of_all(
    own, index, mask, number, addresses, RANK: tl.constexpr, WORLD: tl.constexpr, CAPACITY: tl.constexpr,
    IS_BFLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """own, and the sum: [BLOCK] int32, the bits of float32 or of two bfloat16."""
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(WORLD):
        if rank == RANK:
            value = own
        else:
            value = receive(mailboxes(addresses, RANK) + _place(index, number, rank, WORLD, CAPACITY), mask, number)
        if IS_BFLOAT16:
            first += _low(value)
            second += _high(value)
        else:
            first += value.to(tl.float32, bitcast=True)
    if IS_BFLOAT16:
        total = _pack(first, second)
    else:
        total = first.to(tl.int32, bitcast=True)
    return total


@triton.jit
def _finish_row(
    total, row, columns, mask, residual, weight, out, eps, numbers, SIZE: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the sum over ranks to the residual, store it and its norm, and count the exchange of the row's blocks."""
    index = row * SIZE + columns
    blocks = row * (SIZE // BLOCK) + tl.arange(0, ROW // BLOCK)
    is_block = tl.arange(0, ROW // BLOCK) < SIZE // BLOCK
    next_numbers = tl.load(numbers + blocks, mask=is_block, other=0) + 1
    before = tl.load(residual + index, mask=mask, other=0)
    scales = tl.load(weight + columns, mask=mask, other=0)
    summed = _pack(_low(total) + _low(before), _high(total) + _high(before))
    tl.store(residual + index, summed, mask=mask)
    first = _low(summed)
    second = _high(summed)
    scale = tl.rsqrt(tl.sum(first * first + second * second, 0) / (2 * SIZE) + eps)
    tl.store(out + index, _pack(first * scale * _low(scales), second * scale * _high(scales)), mask=mask)
    tl.store(numbers + blocks, next_numbers, mask=is_block)  # behind the sum, so all threads have read theirs


@triton.jit
def _low(values):
    """The first of the two bfloat16 in int32 values, as float32."""
    return (values << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(values):
    """The second one."""
    return (values >> 16 << 16).to(tl.float32, bitcast=True)


@triton.jit
def _pack(first, second):
    """Two bfloat16, rounded from float32, in int32 values."""
    low = first.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = second.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)
