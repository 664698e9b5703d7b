"""The house keeps its shape: few entries, short files and functions, one meaning per class name, decisions made once.

CONTRIBUTING says what stands where; pyproject.toml's contracts say what may import what.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOUSE = ROOT / "uptrain"
PACKAGES = sorted(path.parent.name for path in HOUSE.glob("*/__init__.py"))
FILES = sorted(path for path in HOUSE.rglob("*.py"))
INTERFACES = {"eager_attention_forward"}
"""Functions whose parameters transformers chooses."""
COMPARED = re.compile(r"\.method (==|in)|latent is None|operation ==")
CONSTRUCTORS = ("uptrain/methods/registry.py", "uptrain/conversion/request.py")
"""Where a name becomes an object: there alone it is compared."""


@dataclass(frozen=True)
class Function:
    """A function or method: where it is, its lines and its parameters other than `self` and `cls`."""

    place: str
    name: str
    lines: int
    parameters: tuple[str, ...]
    docstring: str


def overloads(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether it only declares types that the next definition takes."""
    return any(isinstance(each, ast.Name) and each.id == "overload" for each in node.decorator_list)


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not overloads(node):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            names = tuple(each.arg for each in given if each is not None and each.arg not in ("self", "cls"))
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            yield Function(place, node.name, lines, names, ast.get_docstring(node) or "")


ALL = [function for path in FILES for function in functions(path)]


def test_one_sees_the_whole_from_the_top() -> None:
    assert len({path.name for path in HOUSE.iterdir()} - {"__pycache__"}) <= 16
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (contract,) = [each for each in contracts if each["type"] == "layers" and each["containers"] == ["uptrain"]]
    assert len(contract["layers"]) == 8
    assert sorted(name for row in contract["layers"] for name in row.split(" | ")) == PACKAGES


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}
    assert statistics.median(length for length in lengths.values() if length > 1) < 150


def test_functions_are_short_and_take_few_things() -> None:
    assert [(each.place, each.name, each.lines) for each in ALL if each.lines > 80] == []
    public = {name for package in ["uptrain", *PACKAGES] for name in face(package)} | INTERFACES
    wide = [each for each in ALL if len(each.parameters) > 6]
    assert [(each.place, each.name, len(each.parameters)) for each in wide if not may_be_wide(each, public)] == []


def may_be_wide(function: Function, public: set[str]) -> bool:
    """Tell whether a function may have more than 6 parameters: up to 8, in the command line and in public faces."""
    return len(function.parameters) <= 8 and (function.place.startswith("uptrain/cli/") or function.name in public)


def test_each_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def face(package: str) -> list[str]:
    """Return the names that a package says are its public ones."""
    return list(getattr(import_module("uptrain" if package == "uptrain" else f"uptrain.{package}"), "__all__", []))


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "cli"])
def test_a_package_names_its_public_things(package: str) -> None:
    module = import_module(f"uptrain.{package}")
    assert module.__doc__
    assert face(package)
    assert all(getattr(module, name) is not None for name in face(package))
    assert {*face(package)} <= {*dir(module)}


def test_importing_every_package_is_cheap() -> None:
    code = "".join(f"import uptrain.{package}\n" for package in PACKAGES)
    code += "import sys; print(sorted({'torch', 'transformers', 'pydantic', 'rich'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_decisions_are_objects_not_strings_compared_again() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in FILES
        if str(path.relative_to(ROOT)) not in CONSTRUCTORS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if COMPARED.search(line)
    ]
    assert found == []


def test_public_functions_of_four_parameters_document_each() -> None:
    public = {name for package in ["uptrain", *PACKAGES] for name in face(package)}
    library = [each for each in ALL if not each.place.startswith("uptrain/cli/")]
    wide = [each for each in library if each.name in public and len(each.parameters) >= 4]
    assert wide
    assert [
        (each.place, each.name, name)
        for each in wide
        for name in each.parameters
        if f"- `{name}`:" not in each.docstring
    ] == []


def test_every_test_folder_is_a_package_of_the_house() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders - {*PACKAGES} == {"faults", "fuzz", "numerics", "project", "real"}
