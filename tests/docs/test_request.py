"""docs/request.md: the files are there (test_links), and what is named of them too."""

import re

import pytest

from tests.docs.pages import page
from tests.e2e.system import ROOT

PAGE = page("docs/request.md")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.text.splitlines() if line.startswith("| ") and "](" in line]
LINK = re.compile(r"\[[^\]]*\]\(([^)]+\.py)\)")
NAME = re.compile(r"`([A-Za-z_]\w*)`")


def named(cells: list[str]) -> list[tuple[list[str], str]]:
    """The files and the name of what must be defined in one of them.

    A hop's row has columns of its own for both; elsewhere a name belongs to the link before it.
    """
    if cells[0].isdigit() and len(cells) == 4:
        return [(LINK.findall(cells[1]), name) for name in NAME.findall(cells[2])]
    pairs: list[tuple[list[str], str]] = []
    for cell in cells[1:]:
        for target, rest in re.findall(r"\]\(([^)]+\.py)\)((?:(?!\[\w).)*)", cell):
            pairs += [([target], name) for name in NAME.findall(rest) if name not in ("Abandon", "attend")]
    return pairs


@pytest.mark.parametrize("cells", ROWS, ids=lambda cells: cells[0])
def test_what_a_row_names_is_defined_in_its_files(cells: list[str]) -> None:
    for targets, name in named(cells):
        assert targets, f"{name} belongs to no file"
        sources = [(ROOT / "docs" / target).read_text() for target in targets]
        assert any(re.search(rf"\b(def|class) {name}\b", source) for source in sources), f"{name} in {targets}"


def test_hops_are_numbered_and_most_name_something() -> None:
    hops = [cells for cells in ROWS if cells[0].isdigit()]
    assert [int(cells[0]) for cells in hops] == list(range(1, len(hops) + 1))
    assert sum(len(named(cells)) for cells in ROWS) > 80


def test_processes_are_the_programs_that_run() -> None:
    for name in re.findall(r"`((?:scheduler|executor)_service\.\w+(?:\.\w+)?)`", PAGE.text):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name
