"""Write what the documentation generates from the code: `python docs/generate.py`, or `make docs`.

- docs/families.md: the table of families, as `uptrain families --markdown` prints it;
- docs/methods.md: the table of methods, from their registry;
- docs/scaling.md: the tables of `python -m benchmarks scaling`;
- docs/house.svg: the packages of uptrain in their layers, and which imports which.

Each generator takes a file's text of today and returns what it should be; tests/project/test_docs.py compares the two.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Collection
from html import escape
from importlib import import_module
from pathlib import Path

import grimp

from uptrain.methods.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- uptrain families --markdown -->\n", "\n<!-- /families -->"
METHODS_BEGIN, METHODS_END = "<!-- methods -->\n", "\n<!-- /methods -->"
METHODS_HEAD = "| `--method` | what becomes of the heads | needs |"
WIDTH, BOX_WIDTH, BOX_HEIGHT, ROW = 760, 228, 60, 96
"""Pixels of the picture: its width, a box's width and height, and the distance from one row to the next."""


def family_page(page: str) -> str:
    """Return docs/families.md with the table of today's families between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + printed("-m", "uptrain", "families", "--markdown") + END + rest.partition(END)[2]


def methods_page(page: str) -> str:
    """Return docs/methods.md with the table of the registered methods between its two marks."""
    rows = [METHODS_HEAD, "|---|---|---|"]
    for method in METHODS.values():
        needs = [what for what, needed in (("torch", method.needs_torch), ("text", method.needs_text)) if needed]
        rows.append(f"| `{method.name}` | {method.summary} | {', '.join(needs) or '–'} |")
    before, _, rest = page.partition(METHODS_BEGIN)
    return before + METHODS_BEGIN + "\n".join(rows) + METHODS_END + rest.partition(METHODS_END)[2]


def scaling_page(page: str) -> str:
    """Return docs/scaling.md with each table of the benchmark in place of the one with its columns and first row."""
    lines = page.split("\n")
    for table in printed("-m", "benchmarks", "scaling").split("\n\n"):
        rows = table.split("\n")
        start = next(at for at, line in enumerate(lines) if line == rows[1] and same_start(lines[at + 1], rows[2]))
        end = next(at for at in range(start, len(lines)) if not lines[at].startswith("|"))
        lines[start - 1 : end] = rows
    return "\n".join(lines)


def same_start(one: str, other: str) -> bool:
    """Tell whether two rows of tables have the same first cell."""
    return one.split("|")[:2] == other.split("|")[:2]


def printed(*words: str) -> str:
    """Return what a Python command prints, without the last line end."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.rstrip("\n")


def house_picture(_: str) -> str:
    """Return the picture of the packages: a row per layer, an arrow per import that no other arrows imply."""
    rows = layers()
    centres = {name: (x, ROW * number + 46) for number, row in enumerate(rows) for name, x in across(row)}
    height = ROW * len(rows) + 24
    note = "An arrow is an import. Left out are arrows that others imply, and those to errors and formatting."
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" role="img" aria-label="The packages of uptrain and their imports">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8Z" fill="#667"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        *(arrow(centres[one], centres[other], centres.values()) for one, other in reduced(imports(rows))),
        *(line for name, centre in centres.items() for line in box(name, *centre)),
        text(WIDTH // 2, height - 10, note, 11, "#445"),
        "</svg>",
    ]
    return "\n".join([*parts, ""])


def layers() -> list[list[str]]:
    """Return the packages of each layer, the highest first, as the import contract in pyproject.toml has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (contract,) = [each for each in contracts if each["type"] == "layers" and each["containers"] == ["uptrain"]]
    return [row.split(" | ") for row in contract["layers"]]


def imports(rows: list[list[str]]) -> set[tuple[str, str]]:
    """Return which package imports which of a lower layer; imports for type checkers alone do not count."""
    depth = {name: number for number, row in enumerate(rows) for name in row}
    graph = grimp.build_graph("uptrain", exclude_type_checking_imports=True, cache_dir=None)
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            one, other = (f"{name}.".split(".")[1] for name in (module, imported))
            if one in depth and other in depth and depth[one] < depth[other]:
                found.add((one, other))
    return found


def reduced(edges: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the edges that no chain of other edges implies, in order."""

    def reached(start: str, without: tuple[str, str]) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            here = waiting.pop()
            new = {edge[1] for edge in edges if edge[0] == here and edge != without} - found
            found |= new
            waiting += new
        return found

    return sorted(edge for edge in edges if edge[1] not in reached(edge[0], edge))


def across(row: list[str]) -> list[tuple[str, int]]:
    """Return each package of a row with its x: one in the middle, two at the sides, three over the whole width."""
    left, middle, right = BOX_WIDTH // 2 + 12, WIDTH // 2, WIDTH - BOX_WIDTH // 2 - 12
    return list(zip(row, {1: [middle], 2: [left, right], 3: [left, middle, right]}[len(row)], strict=True))


def box(name: str, x: int, y: int) -> list[str]:
    """Return a package's box: its name, and the first line of its docstring."""
    about = (import_module(f"uptrain.{name}").__doc__ or "").strip().split("\n")[0].rstrip(".")
    lines = textwrap.wrap(about, 40, max_lines=2, placeholder=" …")
    left, top = x - BOX_WIDTH // 2, y - BOX_HEIGHT // 2
    return [
        f'<rect x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="#eef3fa" stroke="#557"/>',
        text(x, top + 19, f"{name}/", 14, "#113", "bold"),
        *(text(x, top + 36 + 14 * number, line, 11, "#334") for number, line in enumerate(lines)),
    ]


def arrow(start: tuple[int, int], end: tuple[int, int], boxes: Collection[tuple[int, int]]) -> str:
    """Return an arrow from the bottom of one box to the top of another, around the boxes between their rows."""
    (x, y), (to_x, to_y) = (start[0], start[1] + BOX_HEIGHT // 2), (end[0], end[1] - BOX_HEIGHT // 2)
    gap, tip = ROW - BOX_HEIGHT, 8
    blocked = any(start[1] < box_y < end[1] and box_x == to_x for box_x, box_y in boxes)
    bend = to_y - gap if blocked else y
    middle, straight = bend + gap // 2, bend + gap - tip
    path = f"M{x} {y}V{bend}C{x} {middle} {to_x} {middle} {to_x} {straight}V{to_y}"
    return f'<path d="{path}" fill="none" stroke="#667" marker-end="url(#tip)"/>'


def text(x: int, y: int, words: str, size: int, colour: str, weight: str = "normal") -> str:
    """Return words centred at x."""
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="middle"'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


PAGES: dict[str, Callable[[str], str]] = {
    "docs/families.md": family_page,
    "docs/methods.md": methods_page,
    "docs/scaling.md": scaling_page,
    "docs/house.svg": house_picture,
}
"""What is generated, and by what."""


def main() -> None:
    """Write each generated file whose text has changed, and name it."""
    for name, generate in PAGES.items():
        path = ROOT / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = generate(old)
        path.write_text(new, encoding="utf-8")
        print(name, "is current" if old == new else "written")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
