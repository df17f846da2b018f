"""One way of logging for every process of ours."""

import logging
import sys


def log_to_stderr(process: str) -> None:
    """Send records of level INFO and above to stderr, each line with the time and the name of the process."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s {process}[%(process)d] %(levelname)s %(message)s",
    )
