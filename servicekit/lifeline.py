"""What ties a child process to its supervisor: it dies with it, tells it that it is ready, and then that it lives.

The two meet in two environment variables: DUET_READY_FD is a pipe on which the child's first byte says that it is
ready, and every further one that it lives; DUET_PARENT_PID is the process that the child must not outlive. A process
that was started without them, by hand or in a debugger, is neither bound nor heard. Linux only.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys

READY_FD = "DUET_READY_FD"
PARENT_PID = "DUET_PARENT_PID"
BEAT_S = 0.2  # between two signs of life

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def bind_to_parent() -> None:
    """Make the kernel kill this process when its supervisor dies, however it dies; for a child's first line."""
    parent = os.environ.get(PARENT_PID)
    if parent is not None:
        bind_to(int(parent))


def bind_to(parent: int) -> None:
    """Make the kernel kill this process when the process `parent` dies, whose main thread has started it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL)):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the signal was asked for
        sys.exit(f"supervisor {parent} is gone")


def notify_ready() -> None:
    """Tell the supervisor that this process is ready and promises no beats; without one, nothing happens."""
    Heartbeat().close()


class Heartbeat:
    """Signs of life; where there is no supervisor, or another Heartbeat speaks to it, nothing happens.

    The first says that this process is ready, and promises more: a supervisor that then hears none for its
    `hang_timeout_s` takes the process for hung, and kills it. So it must beat from what must not hang.
    """

    def __init__(self) -> None:
        fd = os.environ.pop(READY_FD, None)
        self._fd = int(fd) if fd is not None else None
        if self._fd is not None:
            os.set_blocking(self._fd, False)
            os.set_inheritable(self._fd, False)

    def beat(self) -> None:
        """Give a sign of life."""
        if self._fd is not None:
            # The pipe is full of signs when the supervisor is stopped, and broken when it has just died.
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._fd, b".")

    def beat_in_loop(self) -> None:
        """Give a sign of life now, and one every BEAT_S for as long as the running event loop does."""
        self.beat()
        asyncio.get_running_loop().call_later(BEAT_S, self.beat_in_loop)

    def close(self) -> None:
        """Say that this process is ready, and that it promises no further signs."""
        self.beat()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
