"""Builds step_test.c with the library under sanitizers and runs it: `make test-sanitizers`.

For the best level of this machine and for vectors that every processor has, since both have code of their own.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kernels.cpu.build import compile_command
from kernels.cpu.levels import LEVELS, Level, usable_levels

TEST = Path(__file__).parent / "step_test.c"
SANITIZERS = ("address,undefined", "thread")
# -O1 and no vectoriser: half the time to compile, and lines that a report can name.
OPTIONS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")


def run(compiler: str, level: Level, sanitizers: str, folder: Path) -> bool:
    """Whether the test passes."""
    program = folder / f"{level.name}-{sanitizers}"
    options = (*level.options, *OPTIONS, f"-fsanitize={sanitizers}", str(TEST))
    subprocess.run(compile_command(compiler, options, program), check=True)
    command = [str(program)]
    if sanitizers == "thread" and shutil.which("setarch"):
        command = ["setarch", "--addr-no-randomize", *command]  # its shadow has no room for some random layouts
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"}, check=False)
    print(f"{level.name}, {sanitizers}: {'passed' if done.returncode == 0 else 'FAILED'}", flush=True)
    if done.returncode != 0:
        print(done.stdout, done.stderr, sep="", file=sys.stderr)
    return done.returncode == 0


def main() -> int:
    """Run all; 0 if all pass."""
    compiler = shutil.which("gcc")
    if compiler is None:
        print("There is no gcc.", file=sys.stderr)
        return 1
    levels = dict.fromkeys((usable_levels()[0], LEVELS[-1]))
    with tempfile.TemporaryDirectory() as folder:
        results = [run(compiler, level, names, Path(folder)) for level in levels for names in SANITIZERS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
