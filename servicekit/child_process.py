"""One child process of a supervisor: started, listened to, signalled, and reaped with all that it leaves behind."""

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from servicekit.lifeline import PARENT_PID, READY_FD


@dataclasses.dataclass(frozen=True)
class Child:
    """A process to keep alive."""

    name: str  # unique among its sisters
    argv: Sequence[str]
    env: Mapping[str, str] | None = None  # added to the supervisor's own environment
    output: int | None = None  # file descriptor for stdout and stderr; None: the supervisor's own
    # Seconds that it may go on after SIGTERM, since it drains; SIGINT ends it at once. None: SIGTERM does.
    drain_s: float | None = None
    stops_after: Sequence[str] = ()  # names of sisters that need it while they drain


class ChildProcess:
    """A Child, which may be running."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.ready_at: float | None = None  # time.monotonic() seconds; None until then, at every start
        self.silent_s = 0.0  # how long it has owed a sign of life, in seconds
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: int | None = None  # what it says is read here; None once it was closed

    @property
    def is_running(self) -> bool:
        """From its start until it is reaped."""
        return self._popen is not None

    def start(self) -> None:
        """Start it, in a session and a process group of its own."""
        assert self._popen is None
        self.ready_at, self.silent_s = None, 0.0
        self._pipe, write_fd = os.pipe()
        os.set_blocking(self._pipe, False)
        links = {READY_FD: str(write_fd), PARENT_PID: str(os.getpid())}
        try:
            self._popen = subprocess.Popen(
                self.child.argv,
                env={**os.environ, **(self.child.env or {}), **links},
                stdin=subprocess.DEVNULL,
                stdout=self.child.output,
                stderr=self.child.output,
                pass_fds=(write_fd,),
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor only
            )
        except BaseException:
            self._close_pipe()
            raise
        finally:
            os.close(write_fd)

    def listen(self, turn_s: float) -> None:
        """Hear what it has said in the `turn_s` seconds since this was last asked.

        It owes a sign of life when it was ready and left its pipe open, and whenever it is stopped.
        """
        said = self._read()
        if said and self.ready_at is None:
            self.ready_at = time.monotonic()
        owes = (self.ready_at is not None and self._pipe is not None) or self._state() == os.CLD_STOPPED
        self.silent_s = self.silent_s + turn_s if owes and not said else 0.0

    def has_exited(self) -> bool:
        """Whether it ended; it stays a zombie, so that its id still names its process group."""
        return self._state() in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; where it has ended and is not reaped, nothing happens."""
        assert self._popen
        os.kill(self._popen.pid, number)  # Popen.send_signal would reap it first; not reaped, the id is still its own

    def reap(self) -> int:
        """Wait for its end, if it was killed, and end all of its group; returns its status."""
        assert self._popen
        os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOWAIT)
        os.killpg(self._popen.pid, signal.SIGKILL)
        status = self._popen.wait()
        self._popen = None
        self._close_pipe()
        return status

    def _read(self) -> bool:
        """Whether it has said anything."""
        if self._pipe is None:
            return False
        try:
            said = os.read(self._pipe, 4096)
        except BlockingIOError:
            return False
        if not said:
            self._close_pipe()
        return bool(said)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None

    def _state(self) -> int | None:
        """os.CLD_STOPPED, or one that says how it ended; None while it runs, and where there is no process."""
        if self._popen is None:
            return None
        options = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        changed = os.waitid(os.P_PID, self._popen.pid, options)
        return changed.si_code if changed else None
