"""Text to packed token blocks: tokenised once to a file, or as it streams; the same order for a seed, always."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from uptrain.checkpoint.writer import write_atomic
from uptrain.documents import fingerprint, open_dataset, pieces, rows
from uptrain.errors import UptrainError, UsageError
from uptrain.recipe_schema import Dataset, DataSource
from uptrain.text_files import Piece

Tokens = NDArray[np.integer[Any]]
_BATCH_CHARACTERS = 2**20
_BATCH_PIECES = 256


class BlockReader(Protocol):
    """An endless, deterministic supply of token blocks whose position can be saved and restored."""

    def take(self, count: int) -> Tokens:
        """Return the next blocks, (count, block_size) int64."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""


@dataclass(frozen=True)
class TokenCount:
    """What was tokenised: tokens (separators included), documents, bytes of text, and the tokens' digest."""

    tokens: int
    documents: int
    bytes: int
    digest: str


def separator_of(tokenizer: Any) -> list[int]:
    """Return the tokens that stand between two documents: end of text, else beginning of text, else none."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return [int(token)]
    return []


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts without adding special tokens."""
    out = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(out["input_ids"])


def _batches(text: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in text:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(sources: Sequence[DataSource], tokenizer: Any) -> Iterator[tuple[list[Piece], list[list[int]]]]:
    separator = separator_of(tokenizer)
    started = False
    for batch in _batches(pieces(sources)):
        ids = encode(tokenizer, [piece.text for piece in batch])
        for position, piece in enumerate(batch):
            if piece.first and started:
                ids[position] = separator + ids[position]
            started = True
        yield batch, ids


class TokenFile:
    """Tokens of all sources in a file, which stays on disk; read as blocks in a shuffled order.

    Each epoch cuts the tokens into blocks at another offset and visits them in another order, both from the seed.
    """

    def __init__(self, folder: Path, block_size: int, seed: int) -> None:
        meta = json.loads((folder / "tokens.json").read_text())
        self.count = TokenCount(**meta["count"])
        self.block_size, self.seed = block_size, seed
        if self.count.tokens < block_size:
            raise UsageError(
                f"The data holds {self.count.tokens:,} tokens, less than one block of {block_size:,}.",
                "Give more text, or a smaller block_size.",
            )
        self._tokens: Tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        self._next = 0
        self._epoch: tuple[int, int, Tokens] | None = None

    @staticmethod
    def build(folder: Path, sources: Sequence[DataSource], tokenizer: Any, identity: str = "") -> None:
        """Tokenise the sources into `folder`, unless it holds them already.

        `identity` names the tokenizer, so that another one's tokens are not taken for these.
        """
        key = json.dumps([fingerprint(sources), identity, len(tokenizer)])
        meta = folder / "tokens.json"
        if meta.is_file() and json.loads(meta.read_text())["key"] == key:
            return
        folder.mkdir(parents=True, exist_ok=True)
        dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
        count, documents, size = 0, 0, 0
        digest = hashlib.sha256()
        temporary = folder / "tokens.bin.tmp"
        with temporary.open("wb") as file:
            for batch, ids in _encoded(sources, tokenizer):
                data = np.fromiter(chain.from_iterable(ids), dtype=dtype)
                data.tofile(file)
                digest.update(data.astype("<u4").tobytes())
                count += len(data)
                documents += sum(piece.first for piece in batch)
                size += sum(len(piece.text.encode()) for piece in batch)
        temporary.rename(folder / "tokens.bin")
        counts = TokenCount(count, documents, size, "sha256:" + digest.hexdigest())
        write_atomic(meta, json.dumps({"key": key, "dtype": dtype, "count": asdict(counts)}))

    def take(self, count: int) -> Tokens:
        """Return the next blocks, (count, block_size) int64."""
        out = np.stack([self._block(index) for index in range(self._next, self._next + count)])
        self._next += count
        return out

    def _block(self, index: int) -> Tokens:
        # The offset leaves room in every epoch, so that all have the same number of blocks.
        per_epoch = max(1, (self.count.tokens - self.block_size + 1) // self.block_size)
        epoch, position = divmod(index, per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            slack = self.count.tokens - per_epoch * self.block_size
            offset = int(random.integers(min(slack, self.block_size - 1) + 1))
            self._epoch = (epoch, offset, random.permutation(per_epoch))
        _, offset, order = self._epoch
        start = offset + int(order[position]) * self.block_size
        return self._tokens[start : start + self.block_size].astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of blocks taken, and the digest of the tokens they came from."""
        return {"blocks": self._next, "digest": self.count.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UsageError: the position belongs to other data.
        """
        if state.get("digest") != self.count.digest:
            raise UsageError(
                "The data changed since this run started, so it can't be resumed exactly.",
                "Restore the data, or start anew with --restart.",
            )
        self._next = int(state["blocks"])


class TokenStream:
    """Blocks from a streamed dataset, in its own order, tokenised as they are needed."""

    def __init__(self, source: Dataset, tokenizer: Any, block_size: int) -> None:
        self.source, self.tokenizer, self.block_size = source, tokenizer, block_size
        self._dataset = open_dataset(source)
        self._rows = rows(self._dataset, source)
        self._separator = separator_of(tokenizer)
        self._pending: list[int] = []
        self._epoch, self._in_epoch = 0, 0

    def take(self, count: int) -> Tokens:
        """Return the next blocks, (count, block_size) int64."""
        wanted = count * self.block_size
        while len(self._pending) < wanted:
            self._read()
        out, self._pending = self._pending[:wanted], self._pending[wanted:]
        return np.array(out, dtype=np.int64).reshape(count, self.block_size)

    def _read(self) -> None:
        texts: list[str] = []
        while sum(map(len, texts)) < _BATCH_CHARACTERS // 16 and len(texts) < 64:
            text = next(self._rows, None)
            if text is None:
                break
            texts.append(text)
        if not texts:
            if not self._in_epoch:
                raise UptrainError(f"The dataset {self.source.dataset} has no rows in {self.source.split}.")
            self._epoch, self._in_epoch = self._epoch + 1, 0
            self._rows = rows(self._dataset, self.source)
        for ids in encode(self.tokenizer, texts) if texts else ():
            self._pending += ids + self._separator
        self._in_epoch += len(texts)

    def state_dict(self) -> dict[str, Any]:
        """Return the dataset's own position and the tokens read but not yet taken."""
        inner = self._dataset.state_dict()
        return {"dataset": inner, "epoch": self._epoch, "rows": self._in_epoch, "pending": list(self._pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position without replaying what came before it."""
        self._dataset.load_state_dict(state["dataset"])
        self._rows = rows(self._dataset, self.source)
        self._epoch, self._in_epoch = int(state["epoch"]), int(state["rows"])
        self._pending = list(state["pending"])


@dataclass(frozen=True)
class TokenText:
    """Tokens held in memory for evaluation, (tokens,) int64, and how many bytes of text they spell."""

    ids: Tokens
    bytes: int


def read_tokens(sources: Sequence[DataSource], tokenizer: Any, limit: int) -> TokenText:
    """Tokenise the beginning of the sources, at most `limit` tokens.

    Raises:
        UsageError: there is no text.
    """
    ids: list[int] = []
    size = 0
    for batch, encoded in _encoded(sources, tokenizer):
        for piece, piece_ids in zip(batch, encoded, strict=True):
            room = limit - len(ids)
            kept = piece_ids[:room]
            size += len((piece.text if len(kept) == len(piece_ids) else tokenizer.decode(kept)).encode())
            ids += kept
            if len(ids) == limit:
                return TokenText(np.array(ids, dtype=np.int64), size)
    if len(ids) < 2:
        raise UsageError("There is no text in it.", "Name a file that has some.")
    return TokenText(np.array(ids, dtype=np.int64), size)


def open_reader(sources: Sequence[DataSource], tokenizer: Any, folder: Path, block_size: int, seed: int) -> BlockReader:
    """Return the reader for a recipe's `data`; the tokens of all but streams must have been built in `folder`."""
    first = sources[0]
    if isinstance(first, Dataset) and first.stream:
        return TokenStream(first, tokenizer, block_size)
    return TokenFile(folder, block_size, seed)
