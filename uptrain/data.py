"""A recipe's `data` as a reader of token blocks: one file of tokens, one stream, or a mixture of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uptrain.block_reader import BlockReader
from uptrain.mixture import Mixture
from uptrain.recipe_schema import Dataset, DataSource
from uptrain.token_file import TokenCount, TokenFile
from uptrain.token_stream import TokenStream
from uptrain.token_text import TokenText, read_tokens

__all__ = [
    "BlockReader", "Mixture", "TokenCount", "TokenFile", "TokenStream", "TokenText", "build_tokens", "open_reader",
    "read_tokens",
]  # fmt: skip


def _parts(sources: Sequence[DataSource]) -> list[list[DataSource]]:
    """Return the sources that share a reader: each its own where they have weights, else all together."""
    return [list(sources)] if sources[0].weight is None else [[source] for source in sources]


def _folder_of(folder: Path, part: int, parts: int) -> Path:
    return folder if parts == 1 else folder / str(part)


def build_tokens(sources: Sequence[DataSource], tokenizer: Any, folder: Path, identity: str = "") -> None:
    """Tokenise a recipe's `data`, all but its streams, into `folder`, unless it is there already.

    `identity` names the tokenizer, so that another one's tokens are not taken for these.
    """
    parts = _parts(sources)
    for index, part in enumerate(parts):
        if not _is_stream(part[0]):
            TokenFile.build(_folder_of(folder, index, len(parts)), part, tokenizer, identity)


def open_reader(sources: Sequence[DataSource], tokenizer: Any, folder: Path, block_size: int, seed: int) -> BlockReader:
    """Return the reader of a recipe's `data`, for which `build_tokens` must have been called.

    Raises:
        UsageError: a source has less than one block of text.
    """
    parts = _parts(sources)
    readers: list[BlockReader] = []
    for index, part in enumerate(parts):
        if isinstance(part[0], Dataset) and part[0].stream:
            readers.append(TokenStream(part[0], tokenizer, block_size))
        else:
            readers.append(TokenFile(_folder_of(folder, index, len(parts)), block_size, seed))
    return readers[0] if len(readers) == 1 else Mixture(readers, [source.weight or 0 for source in sources], seed)


def _is_stream(source: DataSource) -> bool:
    return isinstance(source, Dataset) and source.stream
