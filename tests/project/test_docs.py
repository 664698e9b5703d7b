"""What the documentation generates from the code is current: `make docs` writes it."""

from __future__ import annotations

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
