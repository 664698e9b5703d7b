"""Enter an OUT.partial that several processes build, or find that they have finished it."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from uptrain.checkpoint.shared_work import Joint, locked
from uptrain.checkpoint.writer import LOCK, check_out, friendly_errors, is_open_at, leave, make_partial, recover, taken
from uptrain.errors import UsageError


@contextmanager
def joined(
    out: Path,
    overwrite: bool,
    beside: Collection[Path],
    on_note: Callable[[str], None],
    finished: Callable[[], bool],
    prepare: Callable[[bool], None],
) -> Iterator[Joint | None]:
    """Take part in building OUT for as long as the block runs; yield None where others have finished it.

    `finished` says whether OUT stands; `prepare` is called, one process at a time, with whether no other is at work.
    The folders `beside` OUT are removed once it stands; `on_note` is that of `Joint`.

    Raises:
        UsageError: OUT exists and `overwrite` is off, a run that others can't join is writing it, or OUT.partial isn't
            ours.
        UptrainError: the disk is full, can't be written or has no locks.
    """
    joint = Joint(out, overwrite, beside, on_note)
    with friendly_errors(joint.partial):
        while not finished():
            try:
                check_out(out, overwrite)
            except UsageError:
                if finished():
                    break
                raise
            make_partial(joint.partial)
            with _present(joint) as lock:
                if lock is None:
                    continue
                with joint.turn() as there:
                    first = there and _enter(lock, joint)
                    if not there or not is_open_at(joint.partial / LOCK, lock.fileno()):
                        continue
                    if finished():
                        # It became OUT just before this process made the folder anew.
                        if first:
                            leave(joint.partial)
                        break
                    if first:
                        _check_first(joint)
                    prepare(first)
                    # Not kept meanwhile: a run that can't be joined may come between the two kinds of lock.
                    if not locked(lock, fcntl.LOCK_SH):
                        raise taken(out)
                joint.lock = lock
                yield joint
                return
        yield None


@contextmanager
def _present(joint: Joint) -> Iterator[IO[Any] | None]:
    try:
        # In this order: it is by its lock that the folder is known as ours.
        lock = (joint.partial / LOCK).open("a+")
    except FileNotFoundError:  # it became OUT in this moment
        yield None
        return
    with lock:
        try:
            joint.claims.mkdir(exist_ok=True)
        except FileNotFoundError:
            yield None
            return
        yield lock


def _check_first(joint: Joint) -> None:
    try:
        recover(joint.out)
        check_out(joint.out, joint.overwrite)
    except UsageError:
        leave(joint.partial)
        raise


def _enter(lock: IO[Any], joint: Joint) -> bool:
    """Lock the folder against runs that can't be joined; return whether no other process is in it."""
    if locked(lock, fcntl.LOCK_EX):
        return True
    if not locked(lock, fcntl.LOCK_SH):
        raise taken(joint.out)
    return False
