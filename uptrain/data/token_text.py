"""Text to tokens: documents encoded in batches, with a separator between them."""

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
CHARACTERS_A_TOKEN = 4
"""About what a token spells: a batch of text that a few tokens are taken of need not be longer."""
_BATCH_PIECES = 256


def separator_of(tokenizer: Any) -> list[int]:
    """Return the tokens that stand between two documents: end of text, else beginning of text, else none."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return [int(token)]
    return []


def dtype_of(tokenizer: Any, vocab_size: int = 0) -> str:
    """Return the smallest dtype with room for every token, those included that only a model of `vocab_size` knows."""
    largest = max(max(tokenizer.get_vocab().values(), default=0), vocab_size - 1)
    return "uint16" if largest < 2**16 else "uint32"


def start_ids(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before any text: beginning of text, or nothing."""
    begin = tokenizer("")["input_ids"][:1]
    return list(begin) if begin == [tokenizer.bos_token_id] else []


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts without adding special tokens.

    Raises:
        CheckpointError: the tokenizer, though it could be loaded, fails.
    """
    with reported_as(_unfit):
        out = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(out["input_ids"])


def _unfit(reason: str) -> CheckpointError:
    return CheckpointError(f"The tokenizer fails on this text: {reason}", "Download it again, or use another one.")


def renderer_for(sources: Sequence[TextSource], tokenizer: Any) -> Render | None:
    """Return what writes the sources' conversations, or None where there are none.

    Raises:
        UsageError: there are, and the tokenizer has no chat template.
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
    """Yield batches of the sources' pieces with the tokens of each, led by the separator where a document starts.

    A batch ends with the piece that fills `characters`.
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
    """Tokens held in memory for evaluation, (tokens,) int64, and how many bytes of text they spell."""

    ids: Tokens
    bytes: int


def read_tokens(sources: Sequence[TextSource], tokenizer: Any, limit: int) -> TokenText:
    """Tokenise the beginning of the sources, at most `limit` tokens.

    Raises:
        UsageError: there is no text.
    """
    ids: list[int] = []
    size = 0
    for batch, batch_ids in encoded(sources, tokenizer, min(BATCH_CHARACTERS, CHARACTERS_A_TOKEN * limit)):
        for piece, piece_ids in zip(batch, batch_ids, strict=True):
            room = limit - len(ids)
            kept = piece_ids[:room]
            size += len((piece.text if len(kept) == len(piece_ids) else tokenizer.decode(kept)).encode())
            ids += kept
            if len(ids) == limit:
                return TokenText(np.array(ids, dtype=np.int64), size)
    if len(ids) < 2:
        raise UsageError("There is no text in it.", "Name a file that has some.")
    return TokenText(np.array(ids, dtype=np.int64), size)
