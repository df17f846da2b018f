"""Tests as figures: which were run, what came of each, and how long it took."""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


def run_tests(*args: str) -> list[dict[str, Any]]:
    """Run pytest with `args`: `file`, `test`, `outcome` (passed, failed, error or skipped) and `seconds` of each."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as file:
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={file.name}", "-o", "junit_family=xunit1", *args]
        subprocess.run(command, cwd=_ROOT, check=False)
        cases = ElementTree.parse(file.name).iter("testcase")
        return [
            {
                "file": case.attrib["file"],
                "test": case.attrib["name"],
                "outcome": _outcome(case),
                "seconds": round(float(case.attrib["time"]), 2),
            }
            for case in cases
        ]


def _outcome(case: ElementTree.Element) -> str:
    tags = {child.tag for child in case}
    return next((name for tag, name in {"failure": "failed", "error": "error", "skipped": "skipped"}.items()
                 if tag in tags), "passed")  # fmt: skip
