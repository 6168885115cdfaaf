"""The pages of the docs: their links lead somewhere, and the files that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS = ("tutorial", "reference", "report")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    rooms = "penchant|protos|cli|features|training|serving|benchmarks|tests"
    named = set(re.findall(rf"`((?:{rooms})/[\w/.-]*)`", text))
    assert named
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_every_page_has_one_kind() -> None:
    index = (ROOT / "docs/README.md").read_text()
    kinds = dict(re.findall(r"^\| \[[^]]*\]\(([\w.-]+)\) \| (\w+)", index, re.MULTILINE))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(kinds) - {"decisions"} == pages
    assert {kind.rstrip("s") for kind in kinds.values()} == set(KINDS)
