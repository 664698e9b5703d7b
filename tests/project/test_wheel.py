"""The wheel of a clean clone holds what the clone does, and works where there is nothing else, torch least of all.

Builds and installs from the package registry: `pytest -m wheel`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.project.test_constraints import ROOT, pins
from uptrain import __version__

pytestmark = pytest.mark.wheel
NO_OTHER_PLACE = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def call(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(words, env=NO_OTHER_PLACE, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    call("git", "clone", "-q", ROOT, folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, clone, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment that holds the wheel and what it needs, as constraints.txt pins it."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", folder, cwd=folder)
    call(folder / "bin/pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_holds_the_package_the_recipes_and_the_licence_and_nothing_else(clone: Path, wheel: Path) -> None:
    tracked = call("git", "ls-files", cwd=clone).splitlines()
    expected = {name for name in tracked if name.startswith("uptrain/")}
    assert {"uptrain/py.typed", "uptrain/workflows/demo/checkpoint/model.safetensors"} <= expected
    assert {f"uptrain/models/remote_code/{name}.py" for name in ("modeling_uptrain_gpt2", "uptrain_shared")} <= expected
    expected |= {
        name.replace("recipes/", "uptrain/recipes_shipped/") for name in tracked if name.startswith("recipes/")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    about = f"uptrain-{__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == expected
    assert f"{about}licenses/LICENSE" in names


def test_it_converts_and_verifies_where_nothing_else_is_installed(installed: Path, tmp_path: Path) -> None:
    here = {line.partition("==")[0].lower().replace("_", "-"): line.partition("==")[2]
            for line in call(installed / "pip", "list", "--format", "freeze", cwd=tmp_path).splitlines()}  # fmt: skip
    of_python = {"uptrain", "pip", "setuptools"}
    assert not {"torch", "transformers"} & here.keys()
    assert {name: here[name] for name in here.keys() - of_python} == {
        name: pins("constraints.txt").get(name) for name in here.keys() - of_python
    }
    uptrain = installed / "uptrain"
    assert call(uptrain, "--version", cwd=tmp_path).split()[-1] == __version__
    assert "gqa-uptrain" in call(uptrain, "recipes", "list", cwd=tmp_path)
    call(uptrain, "convert", "demo", "out", "--to", "gqa", "--groups", "4", cwd=tmp_path)
    assert "files match" in call(uptrain, "verify", "out", cwd=tmp_path)
