"""Share blocks between two files, where the file system can: no bytes are copied and no disk space is used.

XFS, btrfs and some servers of NFS 4.2 can, within one file system, for whole blocks at the same offset within a block
of both files.
"""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4096
"""Bytes per block in nearly every file system."""
FICLONERANGE = 0x4020940D
"""Linux's request to share blocks; other file systems refuse it."""


@dataclass(frozen=True)
class Span:
    """The `nbytes` bytes of the file `path` from `start`."""

    path: Path
    start: int
    nbytes: int


def residue(spans: Iterable[tuple[Span, int]]) -> int:
    """Return at which offset in a block a shard's data must begin so that most bytes of `spans` can be shared.

    Each span comes with its place in the data. The result is a multiple of 8, as the format requires.
    """
    bytes_by_residue: Counter[int] = Counter()
    for span, position in spans:
        bytes_by_residue[(span.start - position) % BLOCK] += span.nbytes
    fitting = [(count, -begin) for begin, count in bytes_by_residue.items() if begin % 8 == 0]
    return -max(fitting)[1] if fitting else 0


def clone(span: Span, descriptor: int, position: int) -> range:
    """Let the open file share whole blocks of `span` at `position`; return the range of bytes that it now has."""
    begin, end = -(-position // BLOCK) * BLOCK, (position + span.nbytes) // BLOCK * BLOCK
    if (span.start - position) % BLOCK or begin >= end:
        return range(position, position)
    try:
        with span.path.open("rb", buffering=0) as file:
            request = struct.pack("@qQQQ", file.fileno(), span.start + begin - position, end - begin, begin)
            fcntl.ioctl(descriptor, FICLONERANGE, request)
    except OSError:  # the file system can't; reading and writing will raise any other error
        return range(position, position)
    return range(begin, end)


def can_clone(file: Path, folder: Path) -> bool:
    """Tell whether files in `folder` can share blocks of `file`."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return file.stat().st_size >= BLOCK and bool(clone(Span(file, 0, BLOCK), probe.fileno(), 0))


def write_unshared(descriptor: int, data: memoryview, position: int, shared: range) -> None:
    """Write bytes into an open file, except those that it shares with another file.

    - `descriptor`: the open file.
    - `data`: the bytes.
    - `position`: where they begin in the file.
    - `shared`: the range of the file's bytes that is shared already.
    """
    before = data[: max(0, shared.start - position)]
    after = data[max(0, shared.stop - position) :] if shared else data[len(before) :]
    _write_all(descriptor, before, position)
    _write_all(descriptor, after, position + len(data) - len(after))


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    # One write may write only a part: at 2 GiB on Linux, or when the disk is nearly full.
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written
