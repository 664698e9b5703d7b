"""Text to tokens: documents are encoded in batches, with a separator between two documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uptrain.data.block_reader import Tokens
from uptrain.data.chat import Render, renderer
from uptrain.data.documents import pieces
from uptrain.data.sources import TextSource, has_chats
from uptrain.data.text_files import Piece
from uptrain.errors import CheckpointError, UsageError, reported_as

BATCH_CHARACTERS = 2**20
CHARACTERS_PER_TOKEN = 4
"""About the length of a token's text: it limits the text that is encoded where few tokens are needed."""
_BATCH_PIECES = 256


def separator_of(tokenizer: Any) -> list[int]:
    """Return the token between two documents as a list: end of text, else beginning of text, else no token."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return [int(token)]
    return []


def dtype_of(tokenizer: Any, vocab_size: int = 0) -> str:
    """Return the smallest dtype that holds every token of the tokenizer and of a model with `vocab_size` tokens."""
    largest = max(max(tokenizer.get_vocab().values(), default=0), vocab_size - 1)
    return "uint16" if largest < 2**16 else "uint32"


def start_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before any text: beginning of text, or none."""
    begin = tokenizer("")["input_ids"][:1]
    return list(begin) if begin == [tokenizer.bos_token_id] else []


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts without adding special tokens.

    Raises:
        CheckpointError: the tokenizer fails on the text.
    """
    with reported_as(_unfit):
        out = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(out["input_ids"])


def _unfit(reason: str) -> CheckpointError:
    return CheckpointError(f"The tokenizer fails on this text: {reason}", "Download it again, or use another one.")


def renderer_for(sources: Sequence[TextSource], tokenizer: Any) -> Render | None:
    """Return the function that writes the sources' conversations, or None where no source has conversations.

    Raises:
        UsageError: a source has conversations, and the tokenizer has no chat template.
    """
    return renderer(tokenizer) if any(has_chats(source) for source in sources) else None


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
    sources: Sequence[TextSource], tokenizer: Any, characters: int = BATCH_CHARACTERS
) -> Iterator[tuple[list[Piece], list[list[int]]]]:
    """Yield batches of the sources' pieces and the tokens of each piece.

    A document's first piece begins with the separator, except in the first document. A batch ends with the piece that
    reaches `characters`.
    """
    separator = separator_of(tokenizer)
    started = False
    for batch in _batches(pieces(sources, renderer_for(sources, tokenizer)), characters):
        ids = encode(tokenizer, [piece.text for piece in batch])
        for position, piece in enumerate(batch):
            if piece.first and started:
                ids[position] = separator + ids[position]
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
    for batch, batch_ids in encoded(sources, tokenizer, min(BATCH_CHARACTERS, CHARACTERS_PER_TOKEN * limit)):
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
