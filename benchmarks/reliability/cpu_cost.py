"""What two working trees take of the processors for a token, beside the model: the same in turns, as `cost` does.

`python -m benchmarks.reliability.cpu_cost BEFORE AFTER`. The model is the tests' tiny one on one thread, so
that services and client are nearly all of it, and processor time is counted, which neighbours disturb less than
throughput: of all processes, in microseconds an output token of 16 streams.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.reliability.cost import environment, run_pairs
from benchmarks.reliability.services import TINY_FLAGS, Services, tiny_model

STREAMS, INPUT_LEN, OUTPUT_LEN, REPEATS = 16, 16, 400, 8
LOAD = [f"--streams={STREAMS}", f"--input-len={INPUT_LEN}", f"--output-len={OUTPUT_LEN}", "--temperature=0"]


def processor_us(tree: Path, model: Path, log: Path) -> dict[str, float]:
    """Of a token, by whose processes they are."""
    env = environment(tree)
    with Services(model, log, tree=tree, env=env, **TINY_FLAGS) as services:
        bench = [sys.executable, "-m", "duet", "bench", "--address", services.address, *LOAD, "--warm-up=0"]

        def load(repeats: int) -> dict[str, float]:
            """What has been used at its end, in seconds."""
            command = [*bench, f"--repeats={repeats}"]
            subprocess.run(command, cwd=tree, env=env, check=True, stdout=subprocess.DEVNULL)
            return {"services": services.processor_s(), "client": _client_s()}

        before = load(1)  # which meets what the services still do after they are ready
        after = load(REPEATS)
    num_tokens = STREAMS * OUTPUT_LEN * REPEATS
    return {name: 1e6 * (after[name] - before[name]) / num_tokens for name in before}


def _client_s() -> float:
    """Of all children that have ended, which the services have not."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_model(Path(directory, "tiny"))
        run_pairs("cpu_cost", __doc__, lambda tree: processor_us(tree, model, Path(directory, "log")))
