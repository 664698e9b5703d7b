"""Enter an OUT.partial that several worker processes build, or find that they have finished it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from uptrain.checkpoint.locks import LOCK, is_open_at
from uptrain.checkpoint.output_folder import check_out, friendly_errors, leave, make_partial, prepare_alone, taken
from uptrain.checkpoint.shared_work import SharedWorker, try_worker_lock
from uptrain.errors import UsageError


@contextmanager
def enter_shared_folder(
    worker: SharedWorker, finished: Callable[[], bool], prepare: Callable[[bool], None]
) -> Iterator[SharedWorker | None]:
    """Let `worker` take part in building OUT for as long as the block runs; yield None where others have finished it.

    `finished` tells whether OUT is complete. `prepare` is called, one worker at a time, with whether no other worker is
    in the folder.

    Raises:
        UsageError: OUT exists and may not be replaced, a run that others can't join is writing it, or OUT.partial
            isn't ours.
        UptrainError: the disk is full, can't be written or has no locks.
    """
    with friendly_errors(worker.partial):
        while not finished():
            try:
                check_out(worker.out, worker.overwrite)
            except UsageError:
                if finished():
                    break
                raise
            make_partial(worker.partial)
            with _lock_file(worker) as lock:
                if lock is None:
                    continue
                with worker.alone() as there:
                    first = there and _enter(lock, worker)
                    if not there or not is_open_at(worker.partial / LOCK, lock.fileno()):
                        continue
                    if finished():
                        # It became OUT just before this process made the folder again.
                        if first:
                            leave(worker.partial)
                        break
                    if first:
                        prepare_alone(worker.partial, worker.out, worker.overwrite)
                    prepare(first)
                    # Not held meanwhile: a run without --join may come between the two kinds of lock.
                    if not try_worker_lock(lock, shared=True):
                        raise taken(worker.out)
                worker.lock = lock
                yield worker
                return
        yield None


@contextmanager
def _lock_file(worker: SharedWorker) -> Iterator[IO[Any] | None]:
    try:
        # In this order: it is by its lock that the folder is known as ours.
        lock = (worker.partial / LOCK).open("a+")
    except FileNotFoundError:  # it became OUT in this moment
        yield None
        return
    with lock:
        try:
            worker.work_locks.mkdir(exist_ok=True)
        except FileNotFoundError:
            yield None
            return
        yield lock


def _enter(lock: IO[Any], worker: SharedWorker) -> bool:
    """Lock the folder against runs without --join; return whether no other worker is in it."""
    if try_worker_lock(lock):
        return True
    if not try_worker_lock(lock, shared=True):
        raise taken(worker.out)
    return False
