"""A cache of tokenised text by the digest of its content, so that all runs on the same text share it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from uptrain.checkpoint.files import rename_folder, sync_folder
from uptrain.checkpoint.locks import wait_for_lock
from uptrain.data.sources import TextSource
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_file import TokenFile
from uptrain.errors import UptrainError

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def cache_root() -> Path | None:
    """Return the cache's folder: $UPTRAIN_CACHE, else one in $XDG_CACHE_HOME or ~/.cache; None without a home."""
    own, shared = os.environ.get("UPTRAIN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        # The XDG specification ignores a relative path: it would make another cache in each working directory.
        if shared and (place := Path(shared).expanduser()).is_absolute():
            return place / "uptrain"
        return Path.home() / ".cache" / "uptrain"
    except RuntimeError:  # no home, or not the home of anybody
        return None


def tokens_folder(digest: str, sources: Sequence[TextSource], encoder: TextEncoder, fallback: Path) -> Path:
    """Return the folder with the tokens of a digest, and tokenise the sources if there is no such folder.

    A second process that needs the same tokens waits for the first.

    - `digest`: as `content_digest` returned it.
    - `sources`: the text to tokenise.
    - `encoder`: turns it into tokens.
    - `fallback`: the folder to use where the cache can't be written.

    Raises:
        UsageError: the sources can't be read.
        UptrainError: neither place can be written.
    """
    root = cache_root()
    places = [fallback] if root is None else [root / "tokens", fallback]
    for place in places:
        if TokenFile.is_whole(place / digest):
            return place / digest
    reason = ""
    for place in places:
        try:
            return _build(place, digest, sources, encoder)
        except _Unwritable as error:
            reason = str(error)
    raise UptrainError(f"The data's tokens can't be written to {fallback}: {reason}.", "Make room there.")


class _Unwritable(Exception):
    pass


def _build(place: Path, digest: str, sources: Sequence[TextSource], encoder: TextEncoder) -> Path:
    entry, partial = place / digest, place / f"{digest}.partial"
    with _locked(place, digest):
        if TokenFile.is_whole(entry):
            return entry
        try:
            # These files are from a process that was killed, or from a disk that lost synchronised data.
            for remains in (entry, partial):
                if remains.exists():
                    shutil.rmtree(remains)
            partial.mkdir()
            TokenFile.build(partial, sources, encoder)
            sync_folder(partial)
            rename_folder(partial, entry)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _UNWRITABLE:
                raise _Unwritable(error.strerror) from None
            raise
    return entry


@contextmanager
def _locked(place: Path, digest: str) -> Iterator[None]:
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / f"{digest}.lock").open("w")
    except OSError as error:
        raise _Unwritable(error.strerror) from None
    with lock:
        try:
            wait_for_lock(lock)
        except OSError as error:
            # Some network file systems have no locks. Without a lock, two processes could overwrite each other's files.
            raise _Unwritable(error.strerror) from None
        yield
