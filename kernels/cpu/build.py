"""Building the library in C with gcc, once for each state of its sources; `python -m kernels.cpu.build` at set-up.

Builds lie in the user's cache, named after what they were made from. One that is there is used without a compiler.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kernels.cpu.levels import LEVELS, Level, usable_levels

SOURCES = Path(__file__).parent
# Sums may be reordered only where a loop says so: results do not depend on the number of rows.
OPTIONS = ("-std=c11", "-O3", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
           "-Wall", "-Wextra", "-Wno-psabi", "-D_GNU_SOURCE")  # fmt: skip
LIBRARIES = ("-lm", "-lpthread")


class BuildError(Exception):
    """There is no compiler, or it failed."""


def library_directory(environ: Mapping[str, str]) -> Path:
    """Where builds lie: within $XDG_CACHE_HOME or ~/.cache."""
    cache = environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "duet" / "kernels"


def build(level: Level, directory: Path) -> Path:
    """The library for a level, built unless it is there. Raises: BuildError."""
    compiler = shutil.which("gcc")
    stem = f"{level.name}-{_digest(level)}"
    if compiler is None:
        found = sorted(directory.glob(f"{stem}-*.so"))
        if not found:
            raise BuildError("there is no gcc")
        return found[0]
    path = directory / f"{stem}-{_compiler_digest(compiler)}.so"
    if not path.exists():
        _compile(compiler, level, path)
    return path


def compile_command(compiler: str, options: tuple[str, ...], output: Path) -> list[str]:
    """What builds all sources of the library, and others among the options, with them."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    return [compiler, *OPTIONS, *options, "-I", str(SOURCES), *sources, "-o", str(output), *LIBRARIES]


def _compile(compiler: str, level: Level, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Others may build the same thing at the same time: each to a file of its own, and the last one stays.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / path.name
        command = compile_command(compiler, (*level.options, "-shared", "-fPIC"), output)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"gcc failed: {done.stderr.strip()}")
        output.replace(path)


def _digest(level: Level) -> str:
    sources = sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")])
    parts = [f"{path.name}\n{path.read_text()}" for path in sources]
    return _hash("\0".join([*parts, *OPTIONS, *level.options]))


def _compiler_digest(compiler: str) -> str:
    return _hash(subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> int:
    """Build what this machine can run best, or with --all what any machine can run; without gcc, say so."""
    levels = LEVELS if sys.argv[1:] == ["--all"] else usable_levels()[:1]
    for level in levels:
        try:
            print(build(level, library_directory(os.environ)))  # noqa: T201
        except (BuildError, OSError) as error:
            print(f"No library in C ({error}): the CPU will compute with PyTorch alone.", file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
