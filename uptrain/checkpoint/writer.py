"""Write a checkpoint folder that appears whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reflink import BLOCK, Span, clone, residue, write_beside
from uptrain.errors import UptrainError, UsageError

STATE = ".uptrain-state.json"
LOCK = ".uptrain-lock"
CLAIMS = ".uptrain-claims"
"""What processes that build one folder together lock, a file for each piece of work."""


def partial_of(out: Path) -> Path:
    """Return the folder in which OUT is built."""
    return out.with_name(out.name + ".partial")


def check_out(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an OUT that exists, lies inside the source, or has no folder to stand in.

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


def replaced_of(out: Path) -> Path:
    """Return the name under which --overwrite keeps the old OUT until the new one stands."""
    return out.with_name(out.name + ".uptrain-replaced")


def recover(out: Path) -> None:
    """Put back the old OUT that a crash in the middle of an overwrite left under its second name."""
    # A crash between the two renames of an overwrite leaves only the old folder, under its second name.
    old = replaced_of(out)
    if old.exists() and not out.exists():
        old.rename(out)
    elif old.exists():
        _remove(old)


@contextmanager
def staged(
    out: Path,
    overwrite: bool = False,
    keep: Callable[[Path], Collection[str]] = lambda partial: (),
    beside: Collection[Path] = (),
) -> Iterator[Path]:
    """Yield the folder `OUT.partial`, which becomes OUT when the block ends without an error.

    `keep` is asked, once no other run can write there, for the names that stay of what an earlier run left in it.
    The folders `beside` OUT are removed once it stands.

    Raises:
        UsageError: OUT exists and `overwrite` is off, another run is writing it, or OUT.partial isn't ours.
        UptrainError: the disk is full or can't be written.
    """
    check_out(out, overwrite)
    partial = partial_of(out)
    with friendly_errors(partial), _locked(partial, out):
        try:
            recover(out)
            check_out(out, overwrite)
        except UsageError:
            leave(partial)
            raise
        empty(partial, keep(partial))
        yield partial
        commit(partial, out, overwrite, beside)


@contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """Hold the lock of OUT.partial, which is made if it isn't there."""
    make_partial(partial)
    try:
        lock = (partial / LOCK).open("w")
    except FileNotFoundError:
        raise taken(out) from None  # another run's folder, which has just become OUT
    with lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken(out) from None
        if not is_open_at(partial / LOCK, lock.fileno()):
            raise taken(out)
        yield


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


def is_open_at(path: Path, descriptor: int) -> bool:
    """Say whether the open file `descriptor` is still the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def taken(out: Path) -> UsageError:
    """Return the refusal to write an OUT that is being written."""
    return UsageError(f"Another run is writing {out}.", "Wait for it, or choose another OUT.")


def leave(partial: Path) -> None:
    """Remove OUT.partial if it holds nothing but its locks."""
    if {entry.name for entry in partial.iterdir()} <= {LOCK, CLAIMS}:
        # At once, for a run that comes in the middle would take what is left of it for a stranger's.
        _remove(partial.rename(f"{partial}.{os.getpid()}"))


def empty(folder: Path, kept: Collection[str]) -> None:
    """Remove all of OUT.partial but its locks and the names to be `kept`."""
    for entry in folder.iterdir():
        if entry.name in (LOCK, CLAIMS) or entry.name in kept:
            continue
        remove(entry)


def remove(entry: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all that is in it."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def commit(partial: Path, out: Path, overwrite: bool, beside: Collection[Path]) -> None:
    """Make OUT of the folder it was built in, once all is on the disk, and remove the folders `beside` it.

    Raises:
        UsageError: OUT exists by now and `overwrite` is off.
    """
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            sync(path)
    sync(partial)
    check_out(out, overwrite)
    if out.exists():
        out.rename(replaced_of(out))
    partial.rename(out)
    sync(out.absolute().parent)
    tidy(out, beside)


def tidy(out: Path, beside: Collection[Path] = ()) -> None:
    """Remove what OUT no longer needs now that it stands; again is harmless."""
    (out / LOCK).unlink(missing_ok=True)
    for folder in (out / CLAIMS, replaced_of(out), *beside):
        if folder.exists():
            _remove(folder)
    # Last: as long as it is there, the same command knows that OUT is its own and only this was left to do.
    (out / STATE).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):  # another run is removing it too
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file so that a crash leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def shard_header(tensors: Sequence[TensorInfo], spans: Mapping[str, Span] = MappingProxyType({})) -> bytes:
    """Return the safetensors header of `tensors` in this order; only their sizes are used.

    It is padded to 8 bytes, or to where most bytes of `spans`, which are to be theirs, lie in blocks as in their files.

    Source: safetensors, README, section "Format".
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, places = 0, []
    for info in tensors:
        end = position + info.nbytes
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        if info.name in spans:
            places.append((spans[info.name], position))
        position = end
    text = dump_json_compact(entries)
    text += b" " * ((residue(places) - 8 - len(text)) % BLOCK if places else -len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def dump_json_compact(value: object) -> bytes:
    """Return `value` as JSON bytes without white space."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def write_shard(
    path: Path,
    tensors: Sequence[TensorInfo],
    chunks: Callable[[str], Iterable[memoryview]],
    checksum: Checksum,
    on_bytes: Callable[[int], None],
    spans: Mapping[str, Span] = MappingProxyType({}),
    ending: str = ".tmp",
) -> None:
    """Write one safetensors file through a temporary name with `ending`, digesting its bytes on the way.

    Tensors whose chunks are just the bytes of `spans` share their blocks where the file system can.

    Raises:
        UptrainError: a tensor's chunks don't add up to its declared size.
    """
    temporary = path.with_name(path.name + ending)
    with temporary.open("wb", buffering=0) as file:
        header = shard_header(tensors, spans)
        write_beside(file.fileno(), memoryview(header), 0, range(0))
        checksum.update(header)
        position = len(header)
        for info in tensors:
            end, span = position + info.nbytes, spans.get(info.name)
            shared = clone(span, file.fileno(), position) if span else range(0)
            for chunk in chunks(info.name):
                checksum.update(chunk)
                write_beside(file.fileno(), chunk, position, shared)
                position += len(chunk)
                on_bytes(len(chunk))
            if position != end:
                raise UptrainError(f"Tensor {info.name} came out {position - end:+,} bytes off its planned size.")
        os.fsync(file.fileno())
    temporary.rename(path)


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
