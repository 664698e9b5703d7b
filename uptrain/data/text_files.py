"""Text in local files: plain text, JSONL and Parquet, read in small pieces whatever the size of the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from uptrain.errors import UsageError, did_you_mean, needing

PIECE = 2**20
"""Characters. A longer document is divided at line ends into pieces of about this size."""
_PARQUET_ROWS = 64
_PARQUET_BUFFER = 2**20


class Piece(NamedTuple):
    """A document, or a part of a long one; `first` is true for the part that starts a document."""

    text: str
    first: bool


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


def file_rows(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, each with its place for error messages. A Parquet row has only its `field`.

    Raises:
        UsageError: the file can't be read, or it is Parquet and lacks the field.
    """
    return _parquet(path, field) if path.suffix == ".parquet" else _jsonl(path)


def text_of(row: Any, field: str, where: str) -> str:
    """Return the text in a row's field; `where` names the row in errors.

    Raises:
        UsageError: the field has no text; the error names the row's fields.
    """
    if isinstance(row, dict) and isinstance(row.get(field), str):
        return str(row[field])
    raise no_field(row, field, where, "text", "text_field")


def no_field(row: Any, field: str, where: str, wanted: str, option: str) -> UsageError:
    """Return the error for a row without the wanted content.

    - `row`: the row.
    - `field`: the name of the field.
    - `where`: the row's place in its file.
    - `wanted`: what the field should hold.
    - `option`: the key of the recipe that names the field.
    """
    keys = list(row) if isinstance(row, dict) else []
    if field in keys:
        return UsageError(f"{where} has no {wanted} in its field {field!r}, but {_shown(row[field])}.")
    hint = f"{did_you_mean(field, keys)} It has {', '.join(map(str, keys)) or 'none'}; set {option}.".strip()
    return UsageError(f"{where} has no {wanted} in a field {field!r}.", hint)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


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


def _parquet(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    with needing("Reading Parquet"):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        # Without a buffer, pyarrow reads a row group's whole column at once, and many files have one row group.
        with parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise no_field(dict.fromkeys(names), field, f"{path}", "column", "text_field or chat_field")
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for value in batch.column(field).to_pylist():
                    number += 1
                    yield f"{path}, row {number},", {field: value}
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"{path} can't be read as Parquet: {reason}.", "Was it copied whole?") from None
