"""Let several processes, on one machine or many, build one OUT.partial together.

Whose turn it is and who has which work is said by kernel locks on files in that folder. They end with the process that
holds them, however it ends, so nothing waits for a clock and what a killed process had taken is free again.
"""

from __future__ import annotations

import fcntl
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.progress import FINISHED, State
from uptrain.checkpoint.reflink import Span
from uptrain.checkpoint.writer import CLAIMS, LOCK, commit, empty, is_open_at, leave, partial_of, write_shard
from uptrain.errors import UptrainError

TURN = "turn"
CALIBRATION = "calibration"
"""The turn of what is made beside OUT for all processes."""
PAUSE = 0.5
"""Seconds between two looks at whether other processes have finished, or died."""
PATIENCE = 30.0
"""Seconds after which a process says for whom it waits."""


class Alone:
    """A process that builds a folder by itself: all work is its own, and it is always its turn."""

    def claim(self, work: str) -> AbstractContextManager[bool]:
        """Claim `work`, which no one else can have."""
        return nullcontext(True)

    def turn(self, what: str = TURN) -> AbstractContextManager[bool]:
        """Take the turn that no one else waits for."""
        return nullcontext(True)

    def stands(self) -> bool:
        """Say whether the folder is still to be finished."""
        return True

    def wait(self, work: Collection[str]) -> None:
        """Wait for nothing, as no one else has any work."""

    def finishing(self) -> AbstractContextManager[bool]:
        """Finish, as no one else will."""
        return nullcontext(True)

    write_shard = staticmethod(write_shard)


class Joint:
    """A process's part in a folder that several of them build.

    The folders `beside` OUT are removed once it stands; `on_note` hears for whom this process waits long.
    """

    def __init__(
        self,
        out: Path,
        overwrite: bool = False,
        beside: Collection[Path] = (),
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.out, self.partial = out, partial_of(out)
        self.overwrite, self.beside, self.on_note = overwrite, beside, on_note
        self.claims = self.partial / CLAIMS
        self.lock: IO[Any] | None = None
        self.since: dict[str, float] = {}

    def stands(self) -> bool:
        """Say whether the folder this process entered is still OUT.partial, and so not finished."""
        return self.lock is not None and is_open_at(self.partial / LOCK, self.lock.fileno())

    @contextmanager
    def claim(self, work: str) -> Iterator[bool]:
        """Claim `work` for as long as the block runs; yield whether no other process had it."""
        try:
            file = (self.claims / work).open("a+")
        except FileNotFoundError:  # the folder has become OUT, so all work is done
            yield False
            return
        with file:
            free = locked(file, fcntl.LOCK_EX)
            if free:
                _sign(file)
            yield free

    @contextmanager
    def turn(self, what: str = TURN) -> Iterator[bool]:
        """Wait for what one process at a time may do; yield whether there is still the OUT.partial to do it in."""
        try:
            file = (self.claims / what).open("a+")
        except FileNotFoundError:
            yield False
            return
        with file:
            if not locked(file, fcntl.LOCK_EX):
                patience = threading.Timer(PATIENCE, self._tell, [what])
                patience.start()
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                finally:
                    patience.cancel()
            _sign(file)
            entered = self.lock is None or self.stands()
            yield entered and is_open_at(self.claims / what, file.fileno())

    def wait(self, work: Collection[str]) -> None:
        """Wait a moment for the processes that have `work`; say once who has a piece for long."""
        now = time.monotonic()
        self.since = {piece: self.since.get(piece, now) for piece in work}
        for piece in [piece for piece, since in self.since.items() if now - since >= PATIENCE]:
            self.since[piece] = math.inf
            self._tell(piece)
        time.sleep(PAUSE)

    def _tell(self, work: str) -> None:
        with suppress(FileNotFoundError):  # the folder has become OUT
            who = (self.claims / work).read_text(errors="replace") or "another process"
            self.on_note(f"Waiting for {who}, which has the {work}.")

    def write_shard(
        self,
        path: Path,
        tensors: Sequence[TensorInfo],
        chunks: Callable[[str], Iterable[memoryview]],
        checksum: Checksum,
        on_bytes: Callable[[int], None],
        spans: Mapping[str, Span],
    ) -> None:
        """Write a shard whose work this process has claimed, as `uptrain.checkpoint.writer.write_shard` does."""
        # Under a name of its own: a process cut off from the file system loses its locks without knowing, and goes on.
        for left in path.parent.glob(f"{path.name}.*.tmp"):
            left.unlink(missing_ok=True)
        write_shard(path, tensors, chunks, checksum, on_bytes, spans, f".{os.uname().nodename}-{os.getpid()}.tmp")

    def leave(self, unused: Callable[[], bool]) -> None:
        """Remove the folder if no other process is in it and it is `unused`."""
        with self.turn() as there:
            if there and self.lock is not None and locked(self.lock, fcntl.LOCK_EX) and unused():
                empty(self.partial, ())
                leave(self.partial)

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Wait for the turn to finish; yield whether it is still to be done, and then make OUT of the folder."""
        # Nothing beside OUT is removed while another process is only just looking at it.
        with self.turn(CALIBRATION), self.turn() as needed:
            yield needed
            if needed:
                commit(self.partial, self.out, self.overwrite, self.beside)


class JointState(State):
    """The state of a folder that several processes build: each adds what it has finished."""

    def __init__(self, joint: Joint, plan: str, command: str, asked: str) -> None:
        super().__init__(joint.partial, plan, command, asked)
        self.joint = joint

    def refresh(self) -> None:
        """Add what the other processes have finished."""
        mine = {name: getattr(self, name) for name in FINISHED}
        self.load()
        for name, own in mine.items():
            getattr(self, name).update(own)

    def save(self) -> None:
        """Add what this process has finished to what the others have, and write it."""
        with self.joint.turn() as there:
            if there:
                self.refresh()
                super().save()


def _sign(file: IO[Any]) -> None:
    """Write down in a file that this process has locked whose it is now."""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()


def locked(file: IO[Any], kind: int) -> bool:
    """Lock a file; return whether no other process has it locked otherwise.

    Raises:
        UptrainError: its file system has no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UptrainError(
            f"{file.name} can't be locked: {os.strerror(error.errno or 0)}.",
            "--join needs a file system with locks (NFS 4, Lustre mounted with -o flock); convert without it.",
        ) from None
    return True
