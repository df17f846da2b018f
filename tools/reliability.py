"""Fills in the figures of docs/reliability.md out of benchmarks/results/reliability, and the list of fault points.

`python -m tools.reliability` rewrites the file; with `--check` it only says whether it would change.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from servicekit.fault_points import POINTS
from tools.readme import RESULTS, ROOT, fill_in

PAGE = ROOT / "docs" / "reliability.md"
NOT_MEASURED = "Not measured yet.\n"


def main() -> int:
    """Rewrite or check; returns the exit status."""
    parts = {
        "kills": figures("kills", kills_text),
        "fault points": figures("faults", fault_point_table),
        "poison": figures("faults", poison_text),
        "model check": figures("model_check", model_check_text),
        "churn": figures("churn", churn_text),
        "cost": figures("cost", cost_text),
        "processor time": figures("cpu_cost", cost_text),
    }
    return fill_in(PAGE, parts, module="tools.reliability")


def figures(name: str, render: Callable[[dict[str, Any]], str]) -> str:
    """What was stored under a name, as Markdown."""
    path = RESULTS / "reliability" / f"{name}.json"
    if not path.is_file():
        return NOT_MEASURED
    report = json.loads(path.read_text())
    return render(report) + "\n" + _where(report["machine"])


def kills_text(report: dict[str, Any]) -> str:
    """What became of the streams, and how long recoveries took."""
    settings, streams = report["settings"], report["streams"]
    overlapping = sum(one["overlaps"] for one in report["rounds"])
    text = (
        f"{settings['rounds']} rounds in {report['took_s'] / 60:.0f} minutes under {settings['streams']} streams of "
        f"{settings['model']} (float32, {settings['num_frontends']} front ends, --hang-timeout-s "
        f"{settings['hang_timeout_s']:g}):\n\n"
        "| | |\n| --- | ---: |\n"
        f"| streams that ended as undisturbed ones | {streams['ended'] - streams['different']:,} |\n"
        f"| their tokens | {streams['tokens']:,} |\n"
        f"| tokens lost | {streams['lost_tokens']} |\n"
        f"| tokens delivered twice | {streams['duplicated_tokens']} |\n"
        f"| streams failed | {streams['failed']} |\n"
        f"| streams convicted, since three random kills in a row met them | {streams['convicted']} |\n"
        f"| streams with other tokens | {streams['different']} |\n"
        f"| near ties forgiven | {streams['near_ties']} |\n"
        f"| streams with another text, without a near tie | {streams['other_texts']} |\n\n"
        "Seconds until all went on, of rounds that met no other, and of those that met the recovery of another:\n\n"
        "| what was hit | rounds | p50 | p99 | meeting another | p50 | p99 |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
    )
    for row in report["recovery"]:
        text += f"| {row['process']}, {row['signal']} | {_cells(row['alone_s'])} | {_cells(row['overlapping_s'])} |\n"
    text += f"| nothing, as a measure of the measure | {_cells(report['control_s'])} | | | |\n"
    text += f"| beside it: start of the executor, process to ready | {_cells(report['executor_start_s'])} | | | |\n"
    return text + (
        f"\n{overlapping} rounds met the recovery of another. {report['num_postponed']} rounds waited, since one of "
        "the two rules would have applied.\n"
    )


def _cells(times: dict[str, Any]) -> str:
    """Count, median and 99th percentile, as far as there are any."""
    seconds = [f"{times[name]:.2f}" if name in times else "" for name in ("p50", "p99")]
    return " | ".join([str(times["count"]), *seconds])


def fault_point_table(report: dict[str, Any]) -> str:
    """What happens at each point, and which tests met it."""
    rows = []
    for name, meaning in POINTS.items():
        met = [test for test in report["tests"] if f"[{name}]" in test["test"]]
        told = ", ".join(f"{_fault(test['test'])}: {test['outcome']}" for test in met) or "not tested"
        rows.append(f"| `{name}` | {meaning} | {told} |\n")
    return "| point | where | test |\n| --- | --- | --- |\n" + "".join(rows)


def _fault(test: str) -> str:
    found = re.search(r"_([a-z]+)_at\[", test)
    return found[1] if found else test


def poison_text(report: dict[str, Any]) -> str:
    """The tests of the poison request."""
    tests = [test for test in report["tests"] if "poison" in test["file"]]
    rows = [f"| {_sentence(test['test'])} | {test['outcome']} | {test['seconds']:.1f} |\n" for test in tests]
    return "| test | | seconds |\n| --- | --- | ---: |\n" + "".join(rows)


def _sentence(test: str) -> str:
    name, _, parameter = test.removeprefix("test_").rstrip("]").partition("[")
    return name.replace("_", " ") + f" ({parameter})" * bool(parameter)


def model_check_text(report: dict[str, Any]) -> str:
    """How often what happened, and what was noticed."""
    bugs = Counter(test["outcome"] for test in report["bugs"])
    rows = "".join(f"| {event} | {count:,} |\n" for event, count in report["events"].items())
    return (
        f"{report['runs']:,} lives, {report['took_s'] / 60:.0f} minutes, no difference. Of {bugs.total()} bugs put "
        f"back in on purpose {bugs['passed']} were noticed.\n\n| in all of them | times |\n| --- | ---: |\n{rows}"
    )


def churn_text(report: dict[str, Any]) -> str:
    """Memory, and what is left."""
    settings, before, after = report["settings"], report["idle_checks"]["before"], report["idle_checks"]["after"]
    refused = sum(count for life, count in report["lives"].items() if life.endswith(": refused"))
    errors = {life: count for life, count in report["lives"].items() if not life.endswith((": refused", ": done"))}
    rows = "".join(
        f"| {name} | {row['mib']:.0f} | {row['slope_kib_per_min']:+.0f} ± {row['standard_error']:.0f} | "
        f"{report['open_files'][name]['before']} | {report['open_files'][name]['after']} |\n"
        for name, row in report["memory"].items()
    )
    left = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in report["leftovers"].items())
    return (
        f"{settings['minutes']:g} minutes, {settings['clients']} clients at a time where {settings['slots']} run and "
        f"{settings['queue']} wait: {sum(report['lives'].values()):,} came, {refused:,} of them were refused by a full "
        f"queue, {sum(errors.values())} met an error that nothing explains; {report['tokens']:,} tokens.\n\n"
        "| process | resident, MiB | slope, KiB/min | open files before | after |\n"
        f"| --- | ---: | ---: | ---: | ---: |\n{rows}\n"
        f"Afterwards: {left}. The core's checks when idle: {after['passed'] - before['passed']} passed, "
        f"{after['failed']} failed.\n"
    )


def cost_text(report: dict[str, Any]) -> str:
    """Figures before and after."""
    rows = "".join(
        f"| {name} | {row['before']:.1f} | {row['after']:.1f} | {row['ratio']:.4f} | "
        f"{row['ratio_95'][0]:.4f} to {row['ratio_95'][1]:.4f} | {len(row['pairs'])} |\n"
        for name, row in report["figures"].items()
    )
    commits = report["commits"]
    return (
        f"{commits['before']} against {commits['after']}:\n\n"
        "| | before | after | after / before, median | 95% of medians | pairs |\n"
        f"| --- | ---: | ---: | ---: | ---: | ---: |\n{rows}"
    )


def _where(machine: dict[str, Any]) -> str:
    commit = machine["commit"].replace(machine["commit"][9:40], "")
    return f"On {machine['cores']} cores ({machine['cpu']}), commit {commit}, {machine['date'][:10]}.\n"


if __name__ == "__main__":
    sys.exit(main())
