"""One word per idea: what users read has none of the words that the glossary in CONTRIBUTING replaced."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from uptrain.cli.app import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("recipes/*.yaml"),
    ]
)
REPLACED = {
    "hosts?": "target class",
    "re-?host\\w*": "weight rewrites",
    "uncounted": "MHA-only",
    "layouts?": "schema",
    "speeds|slots|grids?": "rope pairs, inverse frequencies, truncated",
    "(?<!inverse )(?<!rotary )frequencies": "inverse frequencies",
    "re-rotated?": "pre-RoPE latent",
    "bridges?": "head maps, conversion",
    "spread|averages|attended": "statistics",
    "layered": "layer runner",
    "alike": "similar",
    "kept energy|energy kept": "explained energy",
    "heap": "malloc",
    "party|claims?|joined": "worker, lock",
    "arms?": "trial",
    "(?<!its )figures?(?! \\d)": "metric",
    "told|noted": "reported, logged",
    "beside": "next to, with",
    "anew": "again",
    "of so many": "the number",
    "(tokens|values|bytes|bits|nats|steps|parameters|dims|heads|files|GiB) an? (?!time|single)\\w+": "per",
}
"""What to say in place of each."""

CODE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+", re.DOTALL)
"""Names of options, keys and files keep their spelling."""


def found(text: str) -> list[str]:
    """Return each replaced word of a text with what stands around it."""
    prose = CODE.sub("`", text)
    hits = []
    for pattern, better in REPLACED.items():
        for hit in re.finditer(rf"\b({pattern})\b", prose, re.IGNORECASE):
            hits.append(f"…{prose[max(0, hit.start() - 30) : hit.end() + 20]}… say: {better}".replace("\n", " "))
    return hits


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_it_in_the_field_s_words(page: str) -> None:
    assert found((ROOT / page).read_text(encoding="utf-8")) == []


def commands(command: click.Command, path: str = "uptrain") -> Iterator[tuple[str, click.Command]]:
    """Yield a command and those below it, each with what a user types."""
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, f"{path} {name}")


@pytest.mark.parametrize(
    ("path", "command"), list(commands(cli)), ids=lambda value: value if isinstance(value, str) else ""
)
def test_help_says_it_in_the_field_s_words(path: str, command: click.Command) -> None:
    with click.Context(command, info_name=path) as context:
        assert found(command.get_help(context)) == []


def test_a_replaced_word_is_found_in_prose_and_not_in_code() -> None:
    assert len(found("A file lies beside the layout, and figures were told.")) == 4
    assert found("`--rope grid`, `hosts` and [a page](docs/hosts.md) in figure 5") == []


MODULE_NAMES = re.compile(r"\b(forms|choose|streams|source_run|latent_bridge|kept|turns?|words)\b", re.IGNORECASE)
"""Replaced names of modules that are plain English too: CONTRIBUTING and messages may say them, these pages do not."""


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(("README", "docs"))])
def test_a_page_has_no_name_of_a_replaced_module(page: str) -> None:
    assert MODULE_NAMES.findall(CODE.sub("`", (ROOT / page).read_text(encoding="utf-8"))) == []


def test_messages_say_it_in_the_field_s_words() -> None:
    """All text in the package that is no docstring: what errors, notes and tables are made of."""
    hits = []
    for path in sorted((ROOT / "uptrain").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
                # One word alone is a key or a value, and what a user types keeps its spelling.
                text = re.sub(r"--[\w-]+ [\w-]+|rope_mode [\w-]+", "", node.value)
                hits += [f"{path.name}:{node.lineno} {hit}" for hit in (found(text) if " " in text else [])]
    assert hits == []
