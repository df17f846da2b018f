"""Links between our Markdown files, and what the index lists."""

import pytest

from tests.docs.pages import Page, all_pages, page
from tests.e2e.system import ROOT


@pytest.mark.parametrize("source", all_pages(), ids=lambda source: source.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(source: Page) -> None:
    for link in source.links():
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, fragment = link.partition("#")
        path = (source.path.parent / target).resolve() if target else source.path
        assert path.exists(), f"{source.name} links to {link}"
        assert path.is_relative_to(ROOT), f"{source.name} links to {link}, outside the repository"
        if fragment:
            assert fragment in Page(path).anchors(), f"{source.name} links to {link}, where there is no such heading"


def test_links_and_headings_are_found() -> None:
    assert "docs/decisions" in page("README.md").links()
    assert "flags" in page("README.md").anchors()
    assert page("tests/docs/example.md").anchors() == {"one-two-three"}
    assert page("tests/docs/example.md").links() == ["there"]


def test_the_index_lists_every_document() -> None:
    listed = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in page("docs/README.md").links()}
    documents = {path for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"}
    documents |= set((ROOT / "docs").glob("*/README.md"))
    assert documents <= listed


@pytest.mark.parametrize("folder", ["learn", "decisions"])
def test_a_folders_overview_lists_every_page_of_it_in_order(folder: str) -> None:
    pages = sorted(path.name for path in (ROOT / "docs" / folder).glob("*.md") if path.name != "README.md")
    links = page(f"docs/{folder}/README.md").links()
    assert [link for link in links if link in pages] == pages
