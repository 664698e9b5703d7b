"""Text that every machine has: the documentation topics and the source code of Python's standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

HELD_OUT_SHARE = 0.06
# Tests repeat each other; encodings and entities are tables; the other names are generated, installed or not text.
_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data",
    "lib-dynload", "_bundled",
}  # fmt: skip
_SKIPPED_FILES = ("_sysconfigdata", "_aix", "__phello__", "entities.py", "stringprep.py", "pydoc_data")


def documents(split: Literal["train", "held-out"]) -> Iterator[str]:
    """Yield the documents of one split, in the order of their names."""
    for name, read in _named():
        if is_held_out(name) == (split == "held-out"):
            text = read if isinstance(read, str) else _text(read)
            if text:
                yield text


def is_held_out(name: str) -> bool:
    """Return whether a module or topic is held out; the same on every machine and with every Python version."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _named() -> Iterator[tuple[str, str | Path]]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"topic:{topic}", topics[topic]
    root = Path(sysconfig.get_path("stdlib"))
    for path in _sources(root):
        if not path.name.startswith(_SKIPPED_FILES):
            yield ".".join(path.relative_to(root).parts).removesuffix(".py").removesuffix(".__init__"), path


def _sources(root: Path) -> list[Path]:
    """Return the Python files below `root` in order, without listing the folders of installed packages."""
    found: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _text(path: Path) -> str:
    # A few files of the library declare another encoding than UTF-8.
    return path.read_bytes().decode("utf-8", errors="ignore")
