"""Fills in the parts of README.md that come from elsewhere: the flags out of the services' settings.

`python tools/readme.py` rewrites the file; with `--check` it only says whether it would change.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

from executor_service.config import ExecutorConfig
from scheduler_service.config import SchedulerConfig

README = Path(__file__).parent.parent / "README.md"


def main() -> int:
    """Rewrite or check; returns the exit status."""
    old = README.read_text()
    new = old
    for name, settings in (("scheduler flags", SchedulerConfig), ("executor flags", ExecutorConfig)):
        marks = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        new = re.sub(marks, lambda match, s=settings: match[1] + flag_table(s) + match[2], new, flags=re.DOTALL)
    if "--check" in sys.argv:
        if new != old:
            print('README.md is not up to date: run "python tools/readme.py".', file=sys.stderr)
        return int(new != old)
    README.write_text(new)
    return 0


def flag_table(settings: type) -> str:
    """The dataclass's fields as a Markdown table."""
    rows = [_row(field) for field in dataclasses.fields(settings)]
    return "| flag | default | meaning |\n| --- | --- | --- |\n" + "".join(rows)


def _row(field: "dataclasses.Field[Any]") -> str:
    missing = field.default is dataclasses.MISSING
    default = "required" if missing else "" if field.default is None else f"`{field.default}`"
    choices = field.metadata["choices"]
    meaning = field.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
    return f"| `--{field.name.replace('_', '-')}` | {default} | {meaning} |\n"


if __name__ == "__main__":
    sys.exit(main())
