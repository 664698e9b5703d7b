"""Text in local files: plain text, JSONL and Parquet, read in small pieces whatever the size of the file."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from uptrain.data.row_text import RowText, no_field
from uptrain.data.sources import Files
from uptrain.errors import UsageError, needing

PIECE = 2**20
"""Characters. A longer document is divided at line ends into pieces of about this size."""
_PARQUET_ROWS = 64
_PARQUET_BUFFER = 2**20


class Piece(NamedTuple):
    """A document, or a part of a long one; `first` is true for the part that starts a document."""

    text: str
    first: bool


def file_pieces(source: Files, text: RowText) -> Iterator[Piece]:
    """Yield the text of a source's files, in the order of `files_of`; `text` reads their rows.

    Raises:
        UsageError: a file does not exist or can't be read, or a row lacks the field.
    """
    for path in files_of(source):
        if not has_rows(path):
            if source.chat_field is not None:
                raise UsageError(f"{path} is plain text, so it has no chat_field.", "Name JSONL or Parquet files.")
            yield from plain(path)
            continue
        for where, row in _jsonl(path) if path.suffix != ".parquet" else _parquet(path, text.field):
            yield Piece(text.text_of(row, where), True)


def files_of(source: Files) -> list[Path]:
    """Return the files that a source names, in the order given, globs sorted by name.

    Raises:
        UsageError: no file matches a name.
    """
    names = [source.files] if isinstance(source.files, str) else source.files
    found: list[Path] = []
    for name in names:
        expanded = str(Path(name).expanduser())
        # The name of an existing file is a file's name, even where it could be read as a glob.
        matches = [expanded] if Path(expanded).is_file() else sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207
        paths = [Path(match) for match in matches if Path(match).is_file()]
        if not paths:
            raise UsageError(f"No file matches {name}.", "Name text, JSONL or Parquet files, or a glob of them.")
        found += paths
    return found


def first_row(source: Files) -> Any:
    """Return the first row of the first of a source's files that has rows, with all its fields; None without rows.

    Raises:
        UsageError: a file does not exist or can't be read.
    """
    for path in filter(has_rows, files_of(source)):
        rows = _jsonl(path) if path.suffix != ".parquet" else _parquet(path, None)
        for _, row in rows:
            return row
    return None


def has_rows(path: Path) -> bool:
    """Return whether a file's ending says that it holds rows with fields; any other file is one document."""
    return path.suffix in (".jsonl", ".ndjson", ".parquet")


def plain(path: Path) -> Iterator[Piece]:
    """Yield the pieces of a text file.

    Raises:
        UsageError: the file is not UTF-8.
    """
    first = True
    with path.open(encoding="utf-8", newline="") as file:
        while lines := _lines(file, path):
            yield Piece("".join(lines), first)
            first = False


def _lines(file: Any, path: Path) -> list[str]:
    try:
        return list(file.readlines(PIECE))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} near byte {error.start}.") from None


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with path.open(encoding="utf-8") as file:
        while lines := _lines(file, path):
            for line in lines:
                number += 1
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise UsageError(f"{path}, line {number}, is not JSON: {error}.") from None
                yield f"{path}, line {number},", value


def _parquet(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a Parquet file with one `field` each, or with all of them where it is None."""
    with needing("Reading Parquet"):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        # Without a buffer, pyarrow reads a row group's whole column at once, and many files have one row group.
        with parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if field is not None and field not in names:
                raise no_field(dict.fromkeys(names), field, f"{path}", "column", "text_field or chat_field")
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field] if field else None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number},", row
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"{path} can't be read as Parquet: {reason}.", "Was it copied whole?") from None
