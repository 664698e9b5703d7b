"""Let several worker processes, on one machine or many, build one OUT.partial together.

Kernel locks on files in that folder say which worker has which work. They end with the process that holds them, however
it ends. So nothing waits for a clock, and the work of a killed process is free again.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from uptrain.checkpoint import locks
from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.locks import LOCK, WORK_LOCKS, is_open_at, wait_for_lock
from uptrain.checkpoint.output_folder import commit, empty, leave, partial_of
from uptrain.checkpoint.progress import FINISHED, State
from uptrain.checkpoint.shard_writer import ShardContents, write_shard
from uptrain.errors import UptrainError

FOLDER = "turn"
"""The lock on OUT.partial as a whole."""
CALIBRATION = "calibration"
"""The lock on the calibration, which one worker makes for all of them, outside OUT."""
_NAMES = {FOLDER: "the folder", CALIBRATION: "the calibration"}
PAUSE = 0.5
"""Seconds between two looks at whether other workers have finished, or died."""
PATIENCE = 30.0
"""Seconds after which a worker reports for which other worker it waits."""


class SoleWorker:
    """The worker of a folder that one process builds by itself: no other process has any of the work."""

    def lock_work(self, work: str) -> AbstractContextManager[bool]:
        """Lock `work`, which no other process can have."""
        return nullcontext(True)

    def alone(self, what: str = FOLDER) -> AbstractContextManager[bool]:
        """Enter what one worker at a time may do."""
        return nullcontext(True)

    def is_unfinished(self) -> bool:
        """Tell whether the folder is still to be finished."""
        return True

    def wait(self, work: Collection[str]) -> None:
        """Wait for nothing, as no other process has any work."""

    def finishing(self) -> AbstractContextManager[bool]:
        """Finish, as no other process will."""
        return nullcontext(True)

    write_shard = staticmethod(write_shard)


class SharedWorker:
    """One of the worker processes that build a folder together.

    - `out`: the folder; it is built in OUT.partial.
    - `overwrite`: whether an OUT that exists may be replaced.
    - `temporary_folders`: folders outside OUT to remove once OUT is complete.
    - `on_note`: is called with a sentence on the worker for which this one waits long.
    """

    def __init__(
        self,
        out: Path,
        overwrite: bool = False,
        temporary_folders: Collection[Path] = (),
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.out, self.partial = out, partial_of(out)
        self.overwrite, self.temporary_folders, self.on_note = overwrite, temporary_folders, on_note
        self.work_locks = self.partial / WORK_LOCKS
        self.lock: IO[Any] | None = None
        self.since: dict[str, float] = {}

    def is_unfinished(self) -> bool:
        """Tell whether the folder that this worker entered is still OUT.partial, and so not finished."""
        return self.lock is not None and is_open_at(self.partial / LOCK, self.lock.fileno())

    @contextmanager
    def lock_work(self, work: str) -> Iterator[bool]:
        """Lock `work` for as long as the block runs; yield whether no other worker had it."""
        try:
            file = (self.work_locks / work).open("a+")
        except FileNotFoundError:  # the folder has become OUT, so all work is done
            yield False
            return
        with file:
            free = try_worker_lock(file)
            if free:
                _sign(file)
            yield free

    @contextmanager
    def alone(self, what: str = FOLDER) -> Iterator[bool]:
        """Wait for what one worker at a time may do; yield whether there is still the OUT.partial to do it in."""
        try:
            file = (self.work_locks / what).open("a+")
        except FileNotFoundError:
            yield False
            return
        with file:
            if not try_worker_lock(file):
                patience = threading.Timer(PATIENCE, self._report, [what])
                patience.start()
                try:
                    wait_for_lock(file)
                finally:
                    patience.cancel()
            _sign(file)
            entered = self.lock is None or self.is_unfinished()
            yield entered and is_open_at(self.work_locks / what, file.fileno())

    def wait(self, work: Collection[str]) -> None:
        """Wait a moment for the workers that have `work`; report once which worker has a piece for long."""
        now = time.monotonic()
        self.since = {piece: self.since.get(piece, now) for piece in work}
        for piece in [piece for piece, since in self.since.items() if now - since >= PATIENCE]:
            self.since[piece] = math.inf
            self._report(piece)
        time.sleep(PAUSE)

    def _report(self, work: str) -> None:
        with suppress(FileNotFoundError):  # the folder has become OUT
            who = (self.work_locks / work).read_text(errors="replace") or "another process"
            self.on_note(f"Waiting for {who}, which works on {_NAMES.get(work, work)}.")

    def write_shard(
        self, path: Path, shard: ShardContents, checksum: Checksum, on_bytes: Callable[[int], None]
    ) -> None:
        """Write a shard that this worker has locked, as `uptrain.checkpoint.shard_writer.write_shard` does.

        - `path`: the file.
        - `shard`: what it is to hold.
        - `checksum`: is updated with all bytes of the file.
        - `on_bytes`: called with the number of bytes after each piece.
        """
        # Each process has its own temporary name: one that is cut off from the file system loses its locks without
        # knowing, and goes on.
        for left in path.parent.glob(f"{path.name}.*.tmp"):
            left.unlink(missing_ok=True)
        write_shard(path, shard, checksum, on_bytes, f".{os.uname().nodename}-{os.getpid()}.tmp")

    def remove_unused(self, unused: Callable[[], bool]) -> None:
        """Remove the folder if no other worker is in it and it is `unused`."""
        with self.alone() as there:
            if there and self.lock is not None and try_worker_lock(self.lock) and unused():
                empty(self.partial, ())
                leave(self.partial)

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Wait until this worker alone may finish; yield whether it is still to be done, and then make OUT.

        OUT is made of the folder when the block ends.
        """
        # No temporary folder is removed while another process is only just looking at it.
        with self.alone(CALIBRATION), self.alone() as needed:
            yield needed
            if needed:
                commit(self.partial, self.out, self.overwrite, self.temporary_folders)


class SharedState(State):
    """The state of a folder that several workers build: each adds what it has finished."""

    def __init__(self, worker: SharedWorker, plan: str, command: str, asked: str) -> None:
        super().__init__(worker.partial, plan, command, asked)
        self.worker = worker

    def refresh(self) -> None:
        """Add what the other workers have finished."""
        mine = {name: getattr(self, name) for name in FINISHED}
        self.load()
        for name, own in mine.items():
            getattr(self, name).update(own)

    def save(self) -> None:
        """Add what this worker has finished to what the others have, and write it."""
        with self.worker.alone() as there:
            if there:
                self.refresh()
                super().save()


def _sign(file: IO[Any]) -> None:
    """Write into a file that this process has locked which process that is."""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()


def try_worker_lock(file: IO[Any], *, shared: bool = False) -> bool:
    """Lock a file as `uptrain.checkpoint.locks.try_lock` does.

    Raises:
        UptrainError: its file system has no locks.
    """
    try:
        return locks.try_lock(file, shared=shared)
    except OSError as error:
        raise UptrainError(
            f"{file.name} can't be locked: {os.strerror(error.errno or 0)}.",
            "--join needs a file system with locks (NFS 4, Lustre mounted with -o flock); convert without it.",
        ) from None
