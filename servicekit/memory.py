"""What a process asks of the C library's allocator. Does nothing where that is not glibc."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_MAX_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory(num_bytes: int) -> None:
    """Keep up to `num_bytes` that were freed, rather than give them back and have every page cleared when it returns.

    A plan with masks is a message of some hundred kilobytes in several copies: glibc maps each of them afresh.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, num_bytes)
