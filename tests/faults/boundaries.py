"""Stand between a run and the disk: number every call that touches a folder, and do something at one of them.

The calls are the operating system's, as Python reaches them, so a new file or rename in uptrain is a new boundary
without a line here.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.tally import FAILED, KILLED, UNREAD, struck

CHANGING = frozenset({"write", "fsync", "sendfile", "rename", "mkdir", "unlink", "rmdir", "open to write"})


@dataclass(frozen=True)
class Call:
    """One call that touches the disk, and the file's name."""

    kind: str
    name: str

    @property
    def changes(self) -> bool:
        return self.kind in CHANGING


At = Callable[[int, Call, Callable[[], Any], Callable[[int], Any] | None], Any]
"""Called with a boundary's number, its call, the call itself, and how to do only a part of a write."""


class Killed(BaseException):
    """The process is gone: from here on nothing it does reaches the disk."""


@dataclass
class Boundaries:
    """The calls of one run below `root`, in order."""

    root: Path
    at: At
    calls: list[Call] = field(default_factory=list)
    off: bool = False
    _names: dict[int, str] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def meet(self, kind: str, name: Any, act: Callable[[], Any], part: Callable[[int], Any] | None = None) -> Any:
        path = self._names.get(name, "") if isinstance(name, int) else os.fspath(name)
        if self.off or not str(path).startswith(str(self.root)):
            return act()
        call = Call(kind, str(path).removeprefix(str(self.root) + "/"))
        with self._lock:
            self.calls.append(call)
            number = len(self.calls) - 1
        return self.at(number, call, act, part)

    def opened(self, descriptor: int, path: Any) -> None:
        self._names[descriptor] = os.fspath(path) if not isinstance(path, int) else ""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let somebody else's calls pass uncounted."""
        self.off = True
        try:
            yield
        finally:
            self.off = False


@contextmanager
def watched(root: Path, at: At = lambda number, call, act, part: act()) -> Iterator[Boundaries]:
    """Number the calls that touch `root` while the block runs, and let `at` do each."""
    seen = Boundaries(root, at)
    with _patched(_replacements(seen)):
        yield seen


def _replacements(seen: Boundaries) -> list[tuple[Any, str, Any]]:
    real_os_open, real_open, real_pwrite, real_sendfile = os.open, io.open, os.pwrite, os.sendfile

    class Raw(io.FileIO):
        """A raw file whose every read is a boundary."""

        def readinto(self, buffer: Any) -> Any:
            return seen.meet("read", self.name, lambda: io.FileIO.readinto(self, buffer))

        def read(self, size: int = -1) -> Any:
            return seen.meet("read", self.name, lambda: io.FileIO.read(self, size))

    def open_(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        kind = "open to read" if "r" in mode and "+" not in mode else "open to write"

        def act() -> Any:
            if (mode, buffering) == ("rb", 0):
                return Raw(os.fspath(file), "rb")
            made = real_open(file, mode, buffering, *args, **options)
            seen.opened(made.fileno(), file)
            return made

        return act() if isinstance(file, int) else seen.meet(kind, file, act)

    def os_open(path: Any, *args: Any, **options: Any) -> int:
        descriptor = real_os_open(path, *args, **options)
        if options.get("dir_fd") is None:
            seen.opened(descriptor, path)
        return descriptor

    def pwrite(descriptor: int, data: Any, position: int) -> int:
        def half(size: int) -> int:
            return real_pwrite(descriptor, data[: len(data) // size], position)

        return seen.meet("write", descriptor, lambda: real_pwrite(descriptor, data, position), half)

    def sendfile(out: int, *args: Any) -> int:
        return seen.meet("sendfile", out, lambda: real_sendfile(out, *args))

    def one(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda path, *args, **options: seen.meet(kind, path, lambda: real(path, *args, **options))

    def rmtree(path: Any, *args: Any, **options: Any) -> None:
        # By whole paths, where the real one goes by open folders, which have no names here.
        for folder, _, files in os.walk(path, topdown=False):
            for file in files:
                os.unlink(Path(folder) / file)  # noqa: PTH108
            os.rmdir(folder)  # noqa: PTH106

    return [
        (builtins, "open", open_),
        (io, "open", open_),
        (os, "open", os_open),
        (os, "pwrite", pwrite),
        (os, "sendfile", sendfile),
        (os, "fsync", one("fsync", os.fsync)),
        (os, "rename", one("rename", os.rename)),
        (os, "mkdir", one("mkdir", os.mkdir)),
        (os, "unlink", one("unlink", os.unlink)),
        (os, "rmdir", one("rmdir", os.rmdir)),
        (shutil, "rmtree", rmtree),
    ]


@contextmanager
def _patched(replacements: list[tuple[Any, str, Any]]) -> Iterator[None]:
    kept = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    try:
        for module, name, value in replacements:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def killed_at(boundary: int, torn: bool = False) -> At:
    """Return what kills the run just before the call `boundary`, or with `torn` in the middle of it if it writes."""
    dead = False

    def at(number: int, call: Call, act: Callable[[], Any], part: Callable[[int], Any] | None) -> Any:
        nonlocal dead
        if number == boundary:
            struck(KILLED)
            if torn and part is not None:
                part(2)
        dead = dead or number == boundary
        if dead:
            raise Killed
        return act()

    return at


def failing_at(boundary: int, error: int, torn: bool = False) -> At:
    """Return what makes the call `boundary` fail with the errno `error`, after half of it if `torn`."""

    def at(number: int, call: Call, act: Callable[[], Any], part: Callable[[int], Any] | None) -> Any:
        if number == boundary:
            struck(FAILED if call.changes else UNREAD)
            if torn and part is not None:
                part(2)
            raise OSError(error, os.strerror(error), call.name)
        return act()

    return at
