"""Processes that uptrain starts import what uptrain itself imports, whatever lies in the folder a user stands in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import uptrain
from uptrain.checkpoint.source import DEMO
from uptrain.models import child_process

PACKAGE = Path(uptrain.__file__).parent
NAMES = ("torch", "transformers", "json", "numpy", "uptrain")


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """Return a folder as anybody may have published it, with code in it that must never run."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "text"),
    [
        ("uptrain.models.class_keys", (), "[]"),
        ("uptrain.models.rotary_tables", (), "[]"),
        ("uptrain.publishing.hub.tokenizer_probe", (str(DEMO), "quick"), None),
    ],
)
def test_what_lies_where_a_user_stands_is_not_imported(
    module: str, arguments: tuple[str, ...], text: str | None, downloaded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(downloaded)
    done = child_process.ask(module, *arguments, text=text, seconds=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (text or "")
    assert not (downloaded.parent / "ran").exists()


@pytest.mark.slow
def test_converting_inside_a_downloaded_folder_runs_none_of_its_code(downloaded: Path) -> None:
    command = [sys.executable, "-P", "-m", "uptrain", "convert", "demo", "../out", "--to", "gqa", "--groups", "4"]
    paths = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    own = {"PYTHONPATH": paths, "UPTRAIN_CACHE": str(downloaded.parent / "cache")}
    done = subprocess.run(command, cwd=downloaded, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "without asking its class" not in done.stdout + done.stderr
    assert not (downloaded.parent / "ran").exists()


def test_no_other_module_starts_a_python() -> None:
    found = [path.name for path in PACKAGE.rglob("*.py") if "sys.executable" in path.read_text("utf-8")]
    assert found == ["child_process.py"]
