"""Many random lives of the session's model check, and the proof that it bites, as figures.

`python -m benchmarks.reliability.model_check --runs 10000`. The lives are those of tests/property/session_driver.py;
each bug that a test of tests/property puts back in must be noticed.
"""

import argparse
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from benchmarks.reliability.pytest_run import run_tests
from benchmarks.reliability.services import RESULTS, store
from tests.property.session_driver import SessionRun


def live(seed: int) -> Counter[str]:
    """One life; returns what happened in it. Raises: AssertionError, with the seed."""
    try:
        return SessionRun(seed).run()
    except (AssertionError, KeyError, IndexError) as error:
        raise AssertionError(f"run {seed}: {error!r}") from error


def main() -> int:
    """Run and store; returns 1 where a bug was not noticed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability.model_check", description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    began = time.monotonic()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as processes:
        for each in processes.map(live, range(args.runs), chunksize=20):
            counts += each
    took_s = time.monotonic() - began
    tests = run_tests("tests/property", "-k", "notices")
    events = dict(sorted(counts.items()))
    store(RESULTS / "model_check.json", {"runs": args.runs, "took_s": round(took_s, 1), "events": events,
                                         "bugs": tests})  # fmt: skip
    return 0 if tests and all(test["outcome"] == "passed" for test in tests) else 1


if __name__ == "__main__":
    raise SystemExit(main())
