"""Digests of files, written as `algorithm:hex`."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from uptrain.errors import CheckpointError

ALGORITHMS: dict[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
DEFAULT = "blake3"
CHUNK = 2**20
"""Bytes per read: few enough to stay in the processor's cache between reading, hashing and writing."""


_spare = threading.local()


@contextmanager
def borrowed_buffer() -> Iterator[memoryview]:
    """Lend a buffer of CHUNK bytes; the page faults of a new buffer per tensor would take longer than reading."""
    buffers: list[memoryview] = _spare.__dict__.setdefault("buffers", [])
    buffer = buffers.pop() if buffers else memoryview(bytearray(CHUNK))
    try:
        yield buffer
    finally:
        buffers.append(buffer)


class Checksum:
    """A running digest of one algorithm."""

    def __init__(self, algorithm: str = DEFAULT) -> None:
        self.algorithm = algorithm
        self._hash = ALGORITHMS[algorithm]()

    def update(self, data: Any) -> None:
        """Add bytes."""
        self._hash.update(data)

    def text(self) -> str:
        """Return the digest as `algorithm:hex`."""
        return f"{self.algorithm}:{self._hash.hexdigest()}"


def checksum_file(path: Path, algorithm: str = DEFAULT, stopped: Callable[[], bool] = lambda: False) -> str:
    """Return the digest of the file `path`.

    - `path`: the file.
    - `algorithm`: one of ALGORITHMS.
    - `stopped`: once it returns True, reading stops and the digest is meaningless.

    Raises:
        CheckpointError: the file can't be read.
    """
    running = Checksum(algorithm)
    try:
        with path.open("rb", buffering=0) as file, borrowed_buffer() as buffer:
            while (count := file.readinto(buffer)) and not stopped():
                running.update(buffer[:count])
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}.") from None
    return running.text()


def algorithm_of(text: str) -> str:
    """Return the algorithm that a digest's text names, empty where it names none of ALGORITHMS."""
    name = text.partition(":")[0]
    return name if name in ALGORITHMS else ""


class FollowingChecksum:
    """The digest of a whole file, fed with the spans that a copy reads anyway; only the rest is read for it."""

    def __init__(self, path: Path, algorithm: str = DEFAULT) -> None:
        self._path = path
        self._checksum = Checksum(algorithm)
        self._position = 0

    def follow(self, start: int, chunks: Iterable[memoryview]) -> Iterator[memoryview]:
        """Yield the bytes of the file from `start` on, and digest them; a span before the position is not digested."""
        ahead = start >= self._position
        if ahead:
            self._read_until(start)
        for chunk in chunks:
            if ahead:
                self._checksum.update(chunk)
                self._position += len(chunk)
            yield chunk

    def text(self) -> str:
        """Read the rest of the file and return the digest as `algorithm:hex`.

        Raises:
            CheckpointError: the file can't be read or became shorter.
        """
        with self._named_errors():
            size = self._path.stat().st_size
        self._read_until(size)
        return self._checksum.text()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self._path} can't be read: {error.strerror}.") from None

    def _read_until(self, end: int) -> None:
        if end <= self._position:
            return
        with self._named_errors(), self._path.open("rb", buffering=0) as file, borrowed_buffer() as buffer:
            file.seek(self._position)
            while self._position < end:
                count = file.readinto(buffer[: end - self._position])
                if not count:
                    raise CheckpointError(f"{self._path} became shorter while it was read.")
                self._checksum.update(buffer[:count])
                self._position += count
