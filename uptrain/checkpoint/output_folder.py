"""Write a checkpoint folder that appears whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uptrain.checkpoint.files import rename_folder, sync_folder
from uptrain.checkpoint.locks import LOCK, WORK_LOCKS, is_open_at, try_lock
from uptrain.errors import UptrainError, UsageError

STATE = ".uptrain-state.json"
"""The file of OUT.partial that says what is finished in it."""


def partial_of(out: Path) -> Path:
    """Return the folder in which OUT is built."""
    return out.with_name(out.name + ".partial")


def replaced_of(out: Path) -> Path:
    """Return the name under which --overwrite keeps the old OUT until the new one is complete."""
    return out.with_name(out.name + ".uptrain-replaced")


def check_out(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an OUT that exists, lies inside the source or contains it.

    Raises:
        UsageError: as said.
    """
    resolved = out.absolute().resolve()
    if source is not None and (resolved == source.resolve() or source.resolve() in resolved.parents):
        raise UsageError(f"OUT {out} lies inside the source {source}.", "Choose a folder outside it.")
    if source is not None and resolved in source.resolve().parents:
        raise UsageError(f"OUT {out} contains the source {source}.", "Choose another folder.")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} exists and is not a folder.", "Choose another OUT.")
    if out.exists() and not overwrite and any(out.iterdir()):
        raise UsageError(
            f"{out} exists already.", "Choose another OUT, or add --overwrite (of train: overwrite=true) to replace it."
        )


@contextmanager
def staged_output(
    out: Path,
    overwrite: bool = False,
    keep: Callable[[Path], Collection[str]] = lambda partial: (),
    temporary_folders: Collection[Path] = (),
) -> Iterator[Path]:
    """Yield the folder OUT.partial, which becomes OUT when the block ends without an error.

    - `out`: the folder to write.
    - `overwrite`: whether an OUT that exists may be replaced.
    - `keep`: called with OUT.partial after its lock is taken; returns the file names of an earlier run to preserve.
    - `temporary_folders`: folders outside OUT to remove once OUT is complete.

    Raises:
        UsageError: OUT exists and `overwrite` is off, another run is writing it, or OUT.partial isn't ours.
        UptrainError: the disk is full or can't be written.
    """
    check_out(out, overwrite)
    partial = partial_of(out)
    with friendly_errors(partial), _locked(partial, out):
        prepare_alone(partial, out, overwrite)
        empty(partial, keep(partial))
        yield partial
        commit(partial, out, overwrite, temporary_folders)


@contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Hold the lock of OUT.partial, which is made if it isn't there."""
    make_partial(partial)
    try:
        lock = (partial / LOCK).open("w")
    except FileNotFoundError:
        raise taken(out) from None  # another run's folder, which has just become OUT
    with lock:
        if not try_lock(lock) or not is_open_at(partial / LOCK, lock.fileno()):
            raise taken(out)
        yield


def prepare_alone(partial: Path, out: Path, overwrite: bool) -> None:
    """Put back an old OUT that a crash left under its second name, and check OUT again, with OUT.partial locked.

    Raises:
        UsageError: OUT exists and `overwrite` is off.
    """
    try:
        recover(out)
        check_out(out, overwrite)
    except UsageError:
        leave(partial)
        raise


def recover(out: Path) -> None:
    """Put back the old OUT that a crash in the middle of an overwrite left under its second name."""
    # A crash between the two renames of an overwrite leaves only the old folder, under its second name.
    old = replaced_of(out)
    if old.exists() and not out.exists():
        old.rename(out)
    elif old.exists():
        _remove(old)


def make_partial(partial: Path) -> None:
    """Make the folder OUT.partial if it isn't there.

    Raises:
        UsageError: a folder of that name is there, and isn't ours.
    """
    try:
        before, names = partial.stat(), [entry.name for entry in partial.iterdir()]
        # Ours loses its lock too, but only once it has become OUT and so is gone from here.
        strange = names != [] and LOCK not in names and os.path.samestat(before, partial.stat())
    except FileNotFoundError:
        strange = False
    if strange:
        raise UsageError(f"{partial} exists and was not made by uptrain.", "Move it away, or choose another OUT.")
    partial.mkdir(parents=True, exist_ok=True)


def taken(out: Path) -> UsageError:
    """Return the refusal to write an OUT that another run is writing."""
    return UsageError(f"Another run is writing {out}.", "Wait for it, or choose another OUT.")


def leave(partial: Path) -> None:
    """Remove OUT.partial if it holds nothing but its locks."""
    if {entry.name for entry in partial.iterdir()} <= {LOCK, WORK_LOCKS}:
        # In one step: a run that comes in the middle would find a folder without a lock, and refuse it.
        _remove(partial.rename(f"{partial}.{os.getpid()}"))


def empty(folder: Path, kept: Collection[str]) -> None:
    """Remove all of OUT.partial but its locks and the names in `kept`."""
    for entry in folder.iterdir():
        if entry.name in (LOCK, WORK_LOCKS) or entry.name in kept:
            continue
        remove(entry)


def remove(entry: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all that is in it."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def commit(partial: Path, out: Path, overwrite: bool, temporary_folders: Collection[Path]) -> None:
    """Rename OUT.partial to OUT once all its bytes are on the disk; then remove what OUT no longer needs.

    - `partial`: the folder in which OUT was built.
    - `out`: its final name.
    - `overwrite`: whether an OUT that exists may be replaced.
    - `temporary_folders`: folders outside OUT to remove.

    Raises:
        UsageError: OUT exists by now and `overwrite` is off.
    """
    sync_folder(partial)
    check_out(out, overwrite)
    if out.exists():
        out.rename(replaced_of(out))
    rename_folder(partial, out)
    tidy(out, temporary_folders)


def tidy(out: Path, temporary_folders: Collection[Path] = ()) -> None:
    """Remove what a complete OUT no longer needs; a second call is harmless."""
    (out / LOCK).unlink(missing_ok=True)
    for folder in (out / WORK_LOCKS, replaced_of(out), *temporary_folders):
        if folder.exists():
            _remove(folder)
    # Last: while this file is there, the same command knows that OUT is its own and only has to be tidied.
    (out / STATE).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):  # another run is removing it too
        shutil.rmtree(folder)


@contextmanager
def friendly_errors(partial: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one sentence.

    Raises:
        UptrainError: the disk is full, can't be written, or failed.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UptrainError(
                f"The disk is full: {partial} could not be finished.",
                "Free space and run the same command again; it goes on where it stopped.",
            ) from None
        reason, name = error.strerror or str(error), error.filename or partial
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UptrainError(f"{name} can't be written: {reason}.") from None
        raise UptrainError(f"{name}: {reason}.", "Run the same command again; it goes on where it stopped.") from None
