"""What the documentation generates from the code is current: `make docs` writes it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATE = runpy.run_path(str(ROOT / "docs/generate.py"))


@pytest.mark.parametrize("name", GENERATE["PAGES"])
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert GENERATE["PAGES"][name](page) == page, "Run `make docs`."


def test_an_arrow_that_others_imply_is_left_out() -> None:
    edges = {("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")}
    assert GENERATE["reduced"](edges) == [("a", "b"), ("a", "d"), ("b", "c")]


GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return a section of CONTRIBUTING, up to the next heading of its level."""
    return re.split(r"^## ", GUIDE.partition(f"## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in a text, their headers left out."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for number, row in enumerate(found) if row[0] != "---" and found[(number + 1) % len(found)][0] != "---"]


def test_every_file_that_the_guide_names_is_there() -> None:
    named = set(re.findall(r"`((?:uptrain|tests|docs|benchmarks|recipes|notebooks|\.ci)/[\w./-]+)`", GUIDE))
    assert len(named) > 50
    assert [name for name in sorted(named) if "NAME" not in name and not (ROOT / name).exists()] == []


def test_the_guide_shows_every_package_and_the_eight_steps() -> None:
    house = rows(section("The house"))
    packages = {row[0].strip("`") for row in house if row[0].startswith("`uptrain/")}
    assert packages == {f"uptrain/{path.parent.name}" for path in (ROOT / "uptrain").glob("*/__init__.py")}
    assert [row[0] for row in house if row[0].isdigit()] == list("12345678")
    assert "docs/house.svg" in GUIDE


def test_the_glossary_has_one_line_per_word_in_order() -> None:
    words = [row[0] for row in rows(section("Glossary"))]
    assert len(words) >= 40
    assert [word.lower() for word in words] == sorted({word.lower() for word in words})
