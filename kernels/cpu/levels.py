"""What processors can do, as far as the library in C makes a difference: a build for each level."""

import dataclasses
import platform
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Level:
    """What a build needs of a processor, and what tells the compiler so."""

    name: str
    cpu_flags: frozenset[str]  # as in /proc/cpuinfo
    options: tuple[str, ...]  # of gcc


_AVX2 = frozenset(("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"))
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX512_OPTIONS = ("-march=x86-64-v4", "-mprefer-vector-width=512")

# The best first. The last one, of vectors that every processor has or GCC makes up, needs nothing.
LEVELS = (
    Level(
        "avx512-bf16",
        _AVX512 | {"avx512_bf16", "avx512_vnni"},
        (*_AVX512_OPTIONS, "-mavx512bf16", "-mavx512vnni"),
    ),
    Level("avx512", _AVX512, _AVX512_OPTIONS),
    Level("avx2", _AVX2, ("-march=x86-64-v3",)),
    Level("portable", frozenset(), ()),
)


def usable_levels() -> list[Level]:
    """Those that this machine's processor can run, the best first."""
    flags = _cpu_flags()
    return [level for level in LEVELS if level.cpu_flags <= flags]


def _cpu_flags() -> frozenset[str]:
    if platform.machine() != "x86_64":
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
