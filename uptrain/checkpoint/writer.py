"""Write a checkpoint folder that appears whole or not at all, and can be resumed while it doesn't."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uptrain.checkpoint.checksum import Checksum
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.jsonfile import dump_json, parse_object
from uptrain.errors import UptrainError, UsageError

STATE = ".uptrain-state.json"
LOCK = ".uptrain-lock"


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
        raise UsageError(f"{out} exists already.", "Choose another OUT, or add --overwrite to replace it.")


def replaced_of(out: Path) -> Path:
    """Return the name under which --overwrite keeps the old OUT until the new one stands."""
    return out.with_name(out.name + ".replaced")


def _recover(out: Path) -> None:
    # A crash between the two renames of an overwrite leaves only the old folder, under its second name.
    old = replaced_of(out)
    if old.exists() and not out.exists():
        old.rename(out)
    elif old.exists():
        shutil.rmtree(old)


@contextmanager
def staged(out: Path, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yield the folder `OUT.partial`, which becomes OUT when the block ends without an error.

    With `resume`, what an earlier run left there stays; without, it is removed first.

    Raises:
        UsageError: OUT exists and `overwrite` is off, or another run is writing it.
        UptrainError: the disk is full or can't be written.
    """
    _recover(out)
    check_out(out, overwrite)
    partial = partial_of(out)
    with _friendly_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / LOCK).open("w") as lock:
            _lock(lock.fileno(), out)
            if not resume:
                _empty(partial)
            yield partial
            _commit(partial, out)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"Another run is writing {out}.", "Wait for it, or choose another OUT.") from None


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _commit(partial: Path, out: Path) -> None:
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            sync(path)
    sync(partial)
    old = replaced_of(out)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    sync(out.absolute().parent)
    # Only now: a crash before the rename must still find the state to resume from.
    (out / STATE).unlink(missing_ok=True)
    (out / LOCK).unlink(missing_ok=True)
    if old.exists():
        shutil.rmtree(old)


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


def shard_header(tensors: Sequence[TensorInfo]) -> bytes:
    """Return the safetensors header of `tensors` in this order, padded to 8 bytes; only their sizes are used.

    Source: safetensors, README, section "Format".
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for info in tensors:
        end = position + info.nbytes
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = dump_json_compact(entries)
    text += b" " * (-len(text) % 8)
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
) -> None:
    """Write one safetensors file through a temporary name, digesting its bytes on the way.

    Raises:
        UptrainError: a tensor's chunks don't add up to its declared size.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb", buffering=0) as file:
        header = shard_header(tensors)
        _write_all(file.fileno(), memoryview(header))
        checksum.update(header)
        for info in tensors:
            left = info.nbytes
            for chunk in chunks(info.name):
                checksum.update(chunk)
                _write_all(file.fileno(), chunk)
                left -= len(chunk)
                on_bytes(len(chunk))
            if left:
                raise UptrainError(f"Tensor {info.name} came out {-left:+,} bytes off its planned size.")
        os.fsync(file.fileno())
    temporary.rename(path)


def _write_all(descriptor: int, data: memoryview) -> None:
    # One write may take less than all: at 2 GiB on Linux, or when the disk is nearly full.
    while data:
        data = data[os.write(descriptor, data) :]


@contextmanager
def _friendly_errors(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UptrainError(
                f"The disk is full: {partial} could not be finished.",
                "Free space and run the same command again; it goes on where it stopped.",
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            reason = os.strerror(error.errno)
            raise UptrainError(f"{error.filename or partial} can't be written: {reason}.") from None
        raise


class State:
    """What a run has finished in OUT.partial: the plan's digest, each whole shard's checksum, and notes by layer."""

    def __init__(self, partial: Path, plan_digest: str) -> None:
        self.path = partial / STATE
        self.plan_digest = plan_digest
        self.shards: dict[str, str] = {}
        self.layers: dict[str, Any] = {}

    def load(self) -> str | None:
        """Read an earlier run's state; return its plan's digest, or None where there is none that can be used."""
        try:
            value = parse_object(self.path.read_bytes(), str(self.path))
        except (OSError, UptrainError):
            return None
        shards, layers = value.get("shards"), value.get("layers")
        if isinstance(shards, dict) and isinstance(layers, dict):
            self.shards = {str(name): str(text) for name, text in shards.items()}
            self.layers = layers
        return str(value.get("plan"))

    def save(self) -> None:
        """Write the state atomically."""
        write_atomic(self.path, dump_json({"plan": self.plan_digest, "shards": self.shards, "layers": self.layers}))
