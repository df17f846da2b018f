"""Resident memory and open files of a process and all that descend from it, over time. Linux only."""

import contextlib
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any, Self

INTERVAL_S = 5.0

_PAGE_KIB = os.sysconf("SC_PAGE_SIZE") / 1024


def slope(rows: list[tuple[float, float]]) -> dict[str, Any]:
    """The least squares line through seconds and KiB, with the last value."""
    minutes, kib = [at / 60 for at, _ in rows], [value for _, value in rows]
    if len(rows) < 3:
        return {"mib": kib[-1] / 1024, "slope_kib_per_min": 0.0, "standard_error": float("inf")}
    line = statistics.linear_regression(minutes, kib)
    mean = statistics.fmean(minutes)
    spread = sum((minute - mean) ** 2 for minute in minutes)
    residuals = sum((y - line.slope * x - line.intercept) ** 2 for x, y in zip(minutes, kib, strict=True))
    return {
        "mib": kib[-1] / 1024,
        "slope_kib_per_min": line.slope,
        "standard_error": (residuals / (len(rows) - 2) / spread) ** 0.5,
    }


class MemoryLog:
    """Samples in a thread of its own for as long as its `with` block lasts."""

    def __init__(self, root: int) -> None:
        """`root` is the id of the process, which outlives the block."""
        self._root = root
        self._names = family(root)  # pid -> name
        self._samples: dict[int, list[tuple[float, float]]] = {pid: [] for pid in self._names}  # pid -> seconds, KiB
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, name="memory")
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def num_restarts(self) -> int:
        """Processes that were there at the beginning and are gone."""
        return len(self._names.keys() - family(self._root).keys())

    def open_files(self) -> dict[str, int]:
        """Descriptors that each process holds now."""
        return {name: len(os.listdir(f"/proc/{pid}/fd")) for pid, name in self._names.items() if _is_alive(pid)}

    def samples(self) -> dict[str, list[list[float]]]:
        """Seconds since the beginning and KiB, by process."""
        return {self._names[pid]: [[round(at, 1), kib] for at, kib in rows] for pid, rows in self._samples.items()}

    def slopes(self) -> dict[str, dict[str, Any]]:
        """For each process the least squares line through the second half: KiB a minute, with its standard error."""
        return {self._names[pid]: slope(rows[len(rows) // 2 :]) for pid, rows in self._samples.items()}

    def _sample_until_stopped(self) -> None:
        while True:
            for pid, rows in self._samples.items():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    rows.append((time.monotonic() - self._began, pages * _PAGE_KIB))
            if self._stop.wait(INTERVAL_S):
                return


def family(root: int) -> dict[int, str]:
    """What a process and its descendants are called: their module, numbered where there are several."""
    parents = {pid: parent for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if (parent := _parent(pid))}
    family = {root}
    while found := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= found
    names: dict[int, str] = {}
    for pid in sorted(family):
        name = _name(pid)
        number = sum(other.partition(" ")[0] == name for other in names.values()) + 1
        names[pid] = name if number == 1 else f"{name} {number}"
    return names


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name


def _parent(pid: int) -> int | None:
    """None where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/fd").exists()
