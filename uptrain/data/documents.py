"""Reading text sources: local files, datasets and the standard library. No source is held in memory whole."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uptrain.data.chat import Render, messages_of
from uptrain.data.sources import Builtin, Dataset, Files, TextSource
from uptrain.data.text_files import Piece, file_rows, has_rows, no_field, plain, text_of
from uptrain.errors import UptrainError, UsageError, needing

if TYPE_CHECKING:
    import datasets


def pieces(sources: Sequence[TextSource], render: Render | None = None) -> Iterator[Piece]:
    """Yield the text of all sources in order, piece by piece.

    `render` writes the conversations of sources with a chat_field; None where there are none.

    Raises:
        UsageError: a file or dataset does not exist, text is not UTF-8, or a row lacks the field.
    """
    for source in sources:
        if isinstance(source, Files):
            for path in files_of(source):
                yield from _file(path, source, render)
        elif isinstance(source, Dataset):
            yield from (Piece(text, True) for text in rows(open_dataset(source), source, render))
        elif isinstance(source, Builtin):
            from uptrain.data.stdlib_text import documents

            yield from (Piece(text, True) for text in documents(source.split))
        else:
            raise UsageError(
                "The teacher writes tokens to train on; they can't be read as text.", "Name another source."
            )


def _file(path: Path, source: Files, render: Render | None) -> Iterator[Piece]:
    if has_rows(path):
        found = file_rows(path, source.chat_field or source.text_field)
        return (Piece(_text(row, source, where, render), True) for where, row in found)
    if source.chat_field is not None:
        raise UsageError(f"{path} is plain text, so it has no chat_field.", "Name JSONL or Parquet files.")
    return plain(path)


def _text(row: Any, source: Files | Dataset, where: str, render: Render | None) -> str:
    field = source.chat_field
    if field is None:
        return text_of(row, source.text_field, where)
    messages = messages_of(row.get(field)) if isinstance(row, dict) else None
    if messages is None:
        raise no_field(row, field, where, "messages with role and content", "chat_field")
    if render is None:
        raise UsageError("A source with chat_field needs a tokenizer that has a chat template.")
    try:
        return render(messages)
    except UsageError as error:
        raise UsageError(f"{where} can't be written as text. {error.message}", error.hint) from None


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


def open_dataset(source: Dataset) -> datasets.Dataset | datasets.IterableDataset:
    """Load a dataset with the `datasets` library, as a stream if the source says so.

    Raises:
        UsageError: the library is not installed, or the dataset, its configuration or its split does not exist.
    """
    with needing("Reading a dataset"):
        import datasets
    try:
        return datasets.load_dataset(source.dataset, source.name, split=source.split, streaming=source.stream)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"The dataset {source.dataset} can't be loaded: {reason.rstrip('.')}.",
            "Name a Hub dataset, a folder of data files, or text files ending in .txt, .jsonl or .parquet.",
        ) from None


def rows(dataset: Iterable[Any], source: Dataset, render: Render | None = None) -> Iterator[str]:
    """Yield the text of each row of a dataset.

    Raises:
        UptrainError: a row lacks the source's field.
    """
    for row in dataset:
        try:
            yield _text(row, source, f"The dataset {source.dataset}", render)
        except UsageError as error:
            raise UptrainError(error.message, error.hint) from None
