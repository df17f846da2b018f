"""Runs the tests of tests/faults and stores what came of each: every fault point once, and the poison request.

`python -m benchmarks.reliability.faults`.
"""

import argparse

from benchmarks.reliability.pytest_run import run_tests
from benchmarks.reliability.services import RESULTS, store

FILES = ("tests/faults/test_fault_points.py", "tests/faults/test_poison_request.py")


def main() -> int:
    """Run and store; returns 1 where a test did not pass."""
    argparse.ArgumentParser(prog="python -m benchmarks.reliability.faults", description=__doc__).parse_args()
    tests = run_tests(*FILES)
    store(RESULTS / "faults.json", {"tests": tests})
    return 0 if tests and all(test["outcome"] == "passed" for test in tests) else 1


if __name__ == "__main__":
    raise SystemExit(main())
