"""Where an optional package is missing, every command says so in a sentence that names what installs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from uptrain.errors import INSTALLS, UsageError, check_installed, needing, refusal

COMMANDS = {
    "inspect": ["inspect", "demo"],
    "families": ["families"],
    "recipes": ["recipes", "list"],
    "dry": ["convert", "demo", "--to", "mla", "--dry-run"],
    "convert": ["convert", "demo", "mean", "--to", "mqa"],
    "verify": ["verify", "mean"],
    "push": ["push", "mean", "me/mean", "--dry-run", "--license", "mit"],
    "suggest": ["inspect", "demo", "--suggest", "25%"],
    "svd": ["convert", "demo", "svd", "--to", "mqa", "--method", "svd"],
    "similar": ["convert", "demo", "similar", "--to", "gqa", "--groups", "2", "--grouping", "similar"],
    "calibrated": ["convert", "demo", "calibrated", "--to", "mqa", "--method", "calibrated"],
    "latent": ["convert", "demo", "latent", "--to", "mla"],
    "eval": ["eval", "mean", "--tokens", "40", "--context", "32", "--no-speed"],
    "train": ["train", "demo-uptrain", "model=mean", "output=trained"],
    "sweep": ["sweep", "demo", "--to", "mqa", "--methods", "mean", "-o", "swept"],
    "demo": ["demo", "--out", "demo"],
}
TORCH = {"suggest", "svd", "similar", "calibrated", "latent"}
COMPUTING = {"eval", "train", "sweep", "demo"}

CHILD = """
import contextlib, io, json, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
from uptrain.cli.app import run
found = {}
for name, words in json.loads(sys.argv[1]).items():
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        from uptrain.cli import console
        console._console.cache_clear()
        found[name] = [run(words), told.getvalue()]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "refused"),
    [
        ("torch", TORCH | COMPUTING),
        ("torch,transformers,accelerate,tokenizers,datasets,peft", TORCH | COMPUTING),
        ("transformers", COMPUTING | {"calibrated"}),
        ("accelerate", {"train", "demo"}),
    ],
)
def test_no_command_ends_in_a_traceback(hidden: str, refused: set[str], tmp_path: Path) -> None:
    # What would run for long is left out where it isn't refused.
    asked = {name: words for name, words in COMMANDS.items() if name in refused | set(COMMANDS) - TORCH - {"sweep"}}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(asked), hidden], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert {name for name, (code, _) in found.items() if code} == refused, found
    for name in refused:
        code, told = found[name]
        assert code == 2 and "pip install 'uptrain[train]'" in told and "Traceback" not in told
        assert any(package in told for package in hidden.split(","))
    # Nothing is begun that can't be finished.
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {words[2] for name, words in asked.items() if name == "convert"}


def test_an_import_that_is_no_optional_package_is_no_matter_of_installing() -> None:
    assert refusal(ModuleNotFoundError(name="uptrain.nothing"), "This") is None
    with pytest.raises(ImportError), needing("This"):
        raise ImportError("a library is broken", name="numpy")


@pytest.mark.parametrize("package", sorted(INSTALLS))
def test_each_package_is_named_with_what_installs_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=package.replace("_", "-")) as caught:
        check_installed(package, "This")
    assert INSTALLS[package] in caught.value.hint
    with pytest.raises(UsageError, match="This"), needing("This"):
        __import__(f"{package}.inner")
