"""Write files and folders so that a crash leaves the old one whole or the new one whole, never half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced_file(path: Path, ending: str = ".tmp", buffering: int = -1) -> Iterator[IO[bytes]]:
    """Yield an open file that becomes `path` when the block ends without an error and all its bytes are on the disk.

    - `path`: the file to write; an old one stays until the new one is whole.
    - `ending`: what the temporary file's name has after that of `path`.
    - `buffering`: as in `open`.
    """
    temporary = path.with_name(path.name + ending)
    with temporary.open("wb", buffering=buffering) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file in UTF-8, as `replaced_file` does."""
    with replaced_file(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Flush a folder and all files below it to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
    sync(folder)


def rename_folder(folder: Path, final: Path) -> None:
    """Give a folder, which `sync_folder` has flushed, its final name; on return the name is on the disk too."""
    folder.rename(final)
    sync(final.absolute().parent)
