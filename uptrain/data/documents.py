"""Reading text sources: local files, datasets and the standard library. No source is held in memory whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from uptrain.data.chat import Render
from uptrain.data.dataset_rows import dataset_texts, open_dataset
from uptrain.data.row_text import RowText, chat_field_of
from uptrain.data.sources import Builtin, Dataset, Files, TextSource
from uptrain.data.text_files import Piece, file_pieces, first_row
from uptrain.errors import UsageError


def pieces(sources: Sequence[TextSource], render: Render | None = None) -> Iterator[Piece]:
    """Yield the text of all sources in order, piece by piece.

    `render` writes the conversations of sources with a chat_field; None where there are none.

    Raises:
        UsageError: a file or dataset does not exist, text is not UTF-8, or a row lacks the field.
    """
    for source in sources:
        if isinstance(source, Files):
            yield from file_pieces(source, RowText(source, render))
        elif isinstance(source, Dataset):
            found = open_dataset(source)
            yield from (Piece(text, True) for text in dataset_texts(found, source, RowText(source, render)))
        elif isinstance(source, Builtin):
            from uptrain.data.stdlib_text import documents

            yield from (Piece(text, True) for text in documents(source.split))
        else:
            raise UsageError(
                "The teacher writes tokens to train on; they can't be read as text.", "Name another source."
            )


def with_row_fields(source: TextSource) -> TextSource:
    """Return the source with the field of its conversations, where the first row has conversations and no text.

    An option names no fields, so they are looked for.

    Raises:
        UsageError: a file or dataset does not exist, or a file's first row can't be read.
    """
    if not isinstance(source, Files | Dataset) or source.chat_field is not None:
        return source
    row = first_row(source) if isinstance(source, Files) else next(iter(open_dataset(source)), None)
    field = chat_field_of(row, source.text_field)
    return source if field is None else source.model_copy(update={"chat_field": field})
