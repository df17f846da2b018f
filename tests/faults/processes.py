"""Finding our processes from outside, as an operator would."""

import os
from pathlib import Path


def descendants(module: str, model: str) -> list[int]:
    """Ids of the living descendants of this process that run `python -m module --model model`."""
    wanted = {module.encode(), model.encode()}
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and wanted <= _command(name) and _is_ours(name)]


def _command(pid: str) -> set[bytes]:
    """The arguments of a process; none where it has ended."""
    try:
        return set(Path("/proc", pid, "cmdline").read_bytes().split(b"\0"))
    except (FileNotFoundError, ProcessLookupError):
        return set()


def _is_ours(pid: str) -> bool:
    """Whether a process descends from this one; False where it has ended meanwhile."""
    try:
        while pid not in ("0", str(os.getpid())):
            pid = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return pid != "0"
