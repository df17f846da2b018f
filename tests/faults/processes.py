"""Finding our processes from outside, as an operator would."""

import os
from pathlib import Path


def descendants(module: str, model: str) -> list[int]:
    """Ids of the living descendants of this process that run `python -m module --model model`."""
    parents: dict[int, int] = {}
    running: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry.name)] = int(parent)
        if state != "Z" and {module.encode(), model.encode()} <= set(command):
            running.append(int(entry.name))
    return [pid for pid in running if _is_descendant(pid, parents)]


def _is_descendant(pid: int, parents: dict[int, int]) -> bool:
    while pid := parents.get(pid, 0):
        if pid == os.getpid():
            return True
    return False
