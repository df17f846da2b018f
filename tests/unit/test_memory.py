"""Freed memory that is kept costs no page faults when it is taken again."""

import subprocess
import sys

SCRIPT = """
import resource, sys
from servicekit.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory(64 << 20)
pattern = b"x" * 1024
for _ in range(50):
    copies = [pattern * 512 for _ in range(4)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    copies = [pattern * 512 for _ in range(4)]
    del copies
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def test_memory_that_is_kept_is_not_mapped_again():
    assert page_faults("keep") < 500 < page_faults("leave it")
