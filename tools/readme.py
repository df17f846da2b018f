"""Fills in what README.md takes from elsewhere: flags out of the settings, figures out of benchmarks/results.

`python -m tools.readme` rewrites the file; with `--check` it only says whether it would change.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

from executor_service.config import ExecutorConfig
from scheduler_service.config import SchedulerConfig

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Rewrite or check; returns the exit status."""
    parts = {
        "scheduler flags": flag_table(SchedulerConfig),
        "executor flags": flag_table(ExecutorConfig),
        "figures": figure_table(json.loads((RESULTS / "cpu.json").read_text())),
        "gpu figures": gpu_table(RESULTS / "h200"),
        "core figures": core_table(json.loads((RESULTS / "core_step.json").read_text())),
    }
    return fill_in(README, parts, module="tools.readme")


def fill_in(page: Path, parts: dict[str, str], *, module: str) -> int:
    """Rewrite or check what stands between `<!-- NAME -->` and `<!-- end -->` of each part; returns the exit status."""
    old = new = page.read_text()
    for name, text in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        new, count = pattern.subn(lambda match, text=text: match[1] + text + match[2], new)
        assert count == 1, f"{page.name} has no place for {name}"
    if "--check" not in sys.argv:
        page.write_text(new)
    elif new != old:
        print(f'{page.name} is not up to date: run "python -m {module}".', file=sys.stderr)
        return 1
    return 0


def flag_table(settings: type) -> str:
    """The dataclass's fields as a Markdown table."""
    rows = [_flag_row(field) for field in dataclasses.fields(settings)]
    return "| flag | default | meaning |\n| --- | --- | --- |\n" + "".join(rows)


def _flag_row(field: "dataclasses.Field[Any]") -> str:
    missing = field.default is dataclasses.MISSING
    default = "required" if missing else "" if field.default is None else f"`{field.default}`"
    choices = field.metadata["choices"]
    meaning = field.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
    return f"| `--{field.name.replace('_', '-')}` | {default} | {meaning} |\n"


def figure_table(report: dict[str, Any]) -> str:
    """What `make bench` stored, as a sentence and a Markdown table."""
    machine, engines = report["machine"], report["engines"]
    ours = engines[0]["streams"]
    commit = machine["commit"].replace(machine["commit"][9:40], "")
    rows = []
    for engine in engines:
        for streams, figures in engine["streams"].items():
            ratio = ours[streams]["output_tokens_per_s"] / figures["output_tokens_per_s"]
            cells = [
                f"{figures[name]:.0f}" for name in ("output_tokens_per_s", "ttft_ms_p50", "gap_ms_p50", "gap_ms_p99")
            ]
            rows.append(f"| {engine['name']} | {streams} | {' | '.join(cells)} | {ratio:.2f} |\n")
    return (
        f"`make bench` on {machine['cores']} cores ({machine['cpu']}), SmolLM2-135M-Instruct, 128 random tokens in, "
        f"128 out, greedy, commit {commit}, {machine['date'][:10]}; ours is the "
        f"median of {report['settings']['repeats']} runs, a peer ran once:\n\n"
        "| engine | streams | output tok/s | first token p50, ms | gap p50, ms | gap p99, ms | ours / this |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n" + "".join(rows)
    )


def gpu_table(directory: Path) -> str:
    """What `duet bench` stored for each load, as a sentence and a Markdown table."""
    names = {
        "single": "one stream, 128 in, 512 out",
        "fixed8": "8 streams, 512 in, 512 out",
        "fixed64": "64 streams, 512 in, 512 out",
        "fixed256": "256 streams, 512 in, 512 out",
        "seeds": "nano-vLLM's benchmark: 256 streams, 100-1024 in and out",
    }
    reports = {name: json.loads((directory / f"{name}.json").read_text()) for name in names}
    rows = [_gpu_row(names[name], report) for name, report in reports.items()]
    return (
        f"`duet bench` on one {reports['seeds']['limit']['device']}, Qwen3-0.6B's shape with random weights, bf16, "
        "temperature 0.6, through the gRPC streams; medians of two or three runs. The limit: what reading weights and "
        "KV cache, and the prompts' products, would take at the rates measured beside it:\n\n"
        "| load | output tok/s | ms a step | first token p50, ms | p99, ms | gap p99, ms | of the limit |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n" + "".join(rows)
    )


def _gpu_row(name: str, report: dict[str, Any]) -> str:
    median = report["median"]
    times = [f"{median[key] * 1e3:.{digits}f}" for key, digits in
             (("step_s", 2), ("ttft_p50_s", 1), ("ttft_p99_s", 1), ("gap_p99_s", 1))]  # fmt: skip
    limit = report["limit"]
    reached = limit["step_s"] / median["step_s"] if limit["step_s"] else median["tokens_per_s"] / limit["tokens_per_s"]
    return f"| {name} | {median['tokens_per_s']:.0f} | {' | '.join(times)} | {reached:.0%} |\n"


def core_table(report: dict[str, Any]) -> str:
    """What benchmarks.core_step stored, as a Markdown table."""
    rows = [
        f"| {row['running']} | {row['median_us'] / 1e3:.2f} | {row['p99_us'] / 1e3:.2f} | "
        f"{row['plan_median_bytes']:.0f} | {row['plan_max_bytes']} |\n"
        for row in report["core_step"]
    ]
    return (
        "| running sequences | CPU a step, median, ms | p99, ms | bytes of a plan, median | most |\n"
        "| ---: | ---: | ---: | ---: | ---: |\n" + "".join(rows)
    )


if __name__ == "__main__":
    sys.exit(main())
