"""The figures of rounds of kills."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.reliability.comparison import Compared, Ended
from benchmarks.reliability.services import MODULES, quantiles

CONVICTION = "the executor died each time it ran this request"


@dataclasses.dataclass(eq=False)
class Round:
    """One signal."""

    process: str  # a key of MODULES
    signal: str
    gap_s: float  # drawn, since the last round
    sent_at: float  # time.monotonic() seconds
    num_streams: int = 0  # alive then
    overlaps: bool = False  # with the recovery of another round
    recovery_s: float | None = None  # until each of these streams had a new token or had ended

    @property
    def name(self) -> str:
        """For a line of its own."""
        return f"{self.signal} of the {self.process}, {self.gap_s:.2f} s later"


def describe(
    ended: Sequence[Ended], failures: Sequence[str], num_lost: int, num_duplicated: int, compared: Compared
) -> dict[str, Any]:
    """What became of the streams."""
    convicted = [failure for failure in failures if CONVICTION in failure]
    return {
        "streams": {
            "ended": len(ended),
            "tokens": sum(len(stream.token_ids) for stream in ended),
            "lost_tokens": num_lost,
            "duplicated_tokens": num_duplicated,
            "failed": len(failures) - len(convicted),
            "convicted": len(convicted),
            "different": len(compared.differences),
            "other_texts": compared.num_other_texts,
            "near_ties": len(compared.near_ties),
        },
        "failures": list(failures),
        "differences": compared.differences,
        "near_ties": [dataclasses.asdict(tie) for tie in compared.near_ties],
    }


def summarize(rounds: Sequence[Round], control: Sequence[Round], executor_starts_s: Sequence[float]) -> dict[str, Any]:
    """How long recoveries took, seconds; where two rounds overlap, the time is of both, so these count apart."""
    rows = []
    for process, signal in itertools.product(MODULES, ("SIGKILL", "SIGSTOP")):
        alike = [one for one in rounds if (one.process, one.signal) == (process, signal)]
        alone, overlapping = (
            quantiles([one.recovery_s for one in alike if one.recovery_s is not None and one.overlaps == overlaps])
            for overlaps in (False, True)
        )
        rows.append({"process": process, "signal": signal, "alone_s": alone, "overlapping_s": overlapping})
    return {
        "recovery": rows,
        "control_s": quantiles([one.recovery_s for one in control if one.recovery_s is not None]),
        "executor_start_s": quantiles(executor_starts_s),
        "rounds": [
            {
                "process": one.process,
                "signal": one.signal,
                "gap_s": round(one.gap_s, 3),
                "streams": one.num_streams,
                "overlaps": one.overlaps,
                "recovery_s": None if one.recovery_s is None else round(one.recovery_s, 3),
            }
            for one in rounds
        ],
    }
