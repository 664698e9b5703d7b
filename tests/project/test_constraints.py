"""What is pinned is all that gets installed, and the floors that pyproject.toml declares are those that were tested."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(name: str) -> dict[str, str]:
    """Return the version of each package that a constraints file of this repository pins."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    parts = [line.partition("==") for line in lines if not line.startswith("#")]
    assert all(equals for _, equals, _ in parts)
    return {str(canonicalize_name(package)): version for package, _, version in parts}


def declared() -> list[Requirement]:
    project = PROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(text) for each in lists for text in each]
    return [requirement for requirement in found if requirement.name != "uptrain"]


def needed(requirements: list[Requirement]) -> Iterator[str]:
    """Yield the names of requirements and of all that those installed here need in turn."""
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, extra) for requirement in requirements for extra in ("", *requirement.extras)]
    while waiting:
        requirement, extra = waiting.pop()
        if (requirement.name, extra) in seen:
            continue
        seen.add((requirement.name, extra))
        yield str(canonicalize_name(requirement.name))
        try:
            lines = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in lines:
            found = Requirement(line)
            if found.marker is None or found.marker.evaluate({"extra": extra}):
                waiting += [(found, wanted) for wanted in ("", *found.extras)]


def test_everything_that_gets_installed_is_pinned() -> None:
    pinned = pins("constraints.txt")
    looked_at = ("click", "huggingface-hub", "numpy", "pydantic", "rich")
    if any(metadata.version(name) != pinned[name] for name in looked_at):
        pytest.skip("this environment is not the pinned one, and other releases need other packages")
    builds = [Requirement(text) for text in PROJECT["build-system"]["requires"]]
    assert not set(needed([*declared(), *builds])) - pinned.keys()


def test_the_declared_floors_are_the_versions_that_are_tested_as_lowest() -> None:
    lowest, newest = pins("constraints-lowest.txt"), pins("constraints.txt")
    for requirement in declared():
        (floor,) = [each for each in requirement.specifier if each.operator == ">="]
        name = str(canonicalize_name(requirement.name))
        assert Version(lowest[name]) == Version(floor.version), f"{name} was not tested at its floor"
        assert newest[name] in requirement.specifier
