"""Text to tokens: documents are encoded in batches, with a separator between two documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uptrain.data.block_reader import Tokens
from uptrain.data.documents import pieces
from uptrain.data.sources import TextSource
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.text_files import Piece
from uptrain.errors import UsageError

BATCH_CHARACTERS = 2**20
CHARACTERS_PER_TOKEN = 4
"""About the length of a token's text: it limits the text that is encoded where few tokens are needed."""
_BATCH_PIECES = 256


def _batches(text: Iterable[Piece], characters: int) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in text:
        batch.append(piece)
        size += len(piece.text)
        if size >= characters or len(batch) == _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(
    sources: Sequence[TextSource], encoder: TextEncoder, characters: int = BATCH_CHARACTERS
) -> Iterator[tuple[list[Piece], list[list[int]]]]:
    """Yield batches of the sources' pieces and the tokens of each piece.

    A document's first piece begins with the separator, except in the first document. A batch ends with the piece that
    reaches `characters`.
    """
    started = False
    for batch in _batches(pieces(sources, encoder.renderer_for(sources)), characters):
        ids = encoder.tokens_of([piece.text for piece in batch])
        for position, piece in enumerate(batch):
            if piece.first and started:
                ids[position] = encoder.separator + ids[position]
            started = True
        yield batch, ids


@dataclass(frozen=True)
class TokenText:
    """Tokens in memory for evaluation: `ids` (tokens,) int64, and `bytes`, the size of their text in UTF-8."""

    ids: Tokens
    bytes: int


def read_tokens(sources: Sequence[TextSource], tokenizer: Any, limit: int) -> TokenText:
    """Tokenise the beginning of the sources, at most `limit` tokens.

    Raises:
        UsageError: the sources have no text.
    """
    ids: list[int] = []
    size = 0
    for batch, batch_ids in encoded(
        sources, TextEncoder(tokenizer), min(BATCH_CHARACTERS, CHARACTERS_PER_TOKEN * limit)
    ):
        for piece, piece_ids in zip(batch, batch_ids, strict=True):
            room = limit - len(ids)
            used = piece_ids[:room]
            size += len((piece.text if len(used) == len(piece_ids) else tokenizer.decode(used)).encode())
            ids += used
            if len(ids) == limit:
                return TokenText(np.array(ids, dtype=np.int64), size)
    if len(ids) < 2:
        raise UsageError("The text source is empty.", "Name a source that has text.")
    return TokenText(np.array(ids, dtype=np.int64), size)
