"""Kernel locks on files and folders: they end with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

LOCK = ".uptrain-lock"
"""The file of OUT.partial that is locked while OUT is being written: a run alone excludes all others."""
WORK_LOCKS = ".uptrain-claims"
"""The folder of OUT.partial with a lock per piece of work, for worker processes that build one OUT together."""


def try_lock(file: IO[Any], *, shared: bool = False) -> bool:
    """Lock an open file without waiting; return False where another process has a lock that excludes this one.

    A lock that this process already has on the file changes its kind.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(file: IO[Any]) -> None:
    """Lock an open file alone, after all other processes have let go of it.

    Raises:
        OSError: the file system has no locks.
    """
    fcntl.flock(file, fcntl.LOCK_EX)


def is_open_at(path: Path, descriptor: int) -> bool:
    """Tell whether the open file `descriptor` is still the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for `folder`; go on without a lock where there can be none.

    Some network file systems have no locks. What the block does must therefore be whole for any reader at any moment.
    """
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
