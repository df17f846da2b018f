"""Sleeping on a word of shared memory until another process changes it: Linux's futex, which Python does not offer."""

import ctypes
import errno
import os
import platform

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE = 0, 1  # from linux/futex.h; without FUTEX_PRIVATE_FLAG, since processes share the word
_EVERYBODY = 2**31 - 1

_syscall = ctypes.CDLL(None, use_errno=True).syscall  # ctypes releases the GIL while it runs


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class Futex:
    """One aligned 32-bit word of shared memory, which one process writes and others read.

    What was written to the memory before `publish` is seen by whoever read the new value through `load`; and what was
    read before `publish` is not touched by one who has seen the new value. x86-64 keeps such an order by itself. Other
    processors do not, and Python has no barrier to offer: there it is that of the kernel, which passes a full one in
    every wake-up before it looks for sleepers. So each of the two makes such a call between the word and the rest.
    """

    def __init__(self, memory: memoryview) -> None:
        """memory: four writable bytes of a shared mapping."""
        self._word = ctypes.c_uint32.from_buffer(memory)  # read and written as a whole
        self._address = ctypes.c_void_p(ctypes.addressof(self._word))
        self._number = ctypes.c_long(_SYS_FUTEX[platform.machine()])

    def load(self) -> int:
        """The value."""
        value = self._word.value
        self._wake()
        return value

    def publish(self, value: int) -> None:
        """Set the value, and wake those who wait for another one."""
        self._wake()
        self._word.value = value
        self._wake()

    def wait(self, value: int, timeout_s: float) -> bool:
        """Sleep while the word has this value; may return early. Returns False when `timeout_s` have passed."""
        timeout = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
        if not _syscall(self._number, self._address, _WAIT, ctypes.c_uint32(value), ctypes.byref(timeout)):
            return True
        error = ctypes.get_errno()
        if error not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
            raise OSError(error, os.strerror(error))
        return error != errno.ETIMEDOUT

    def _wake(self) -> None:
        _syscall(self._number, self._address, _WAKE, _EVERYBODY, None)
