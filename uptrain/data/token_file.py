"""The tokens of a corpus in a file: tokenised once, then read as blocks in an order that the seed determines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from uptrain.checkpoint.files import write_atomic
from uptrain.data.block_reader import Tokens
from uptrain.data.sources import TextSource
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_text import encoded
from uptrain.errors import UsageError

_READ = 2**20
"""Tokens per read."""


@dataclass(frozen=True)
class TokenCount:
    """What was tokenised.

    - `tokens`: the number of tokens, separators included.
    - `documents`: the number of documents.
    - `bytes`: the size of the text in bytes of UTF-8.
    - `digest`: the digest of the tokens.
    """

    tokens: int
    documents: int
    bytes: int
    digest: str


class TokenFile:
    """Reads the tokens of a file as blocks in a shuffled order; the file is memory-mapped.

    Each epoch divides the tokens into blocks at another offset and in another order. The seed determines both.
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
    def build(folder: Path, sources: Sequence[TextSource], encoder: TextEncoder) -> None:
        """Tokenise the sources and write the tokens into `folder`.

        Raises:
            UsageError: a source can't be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        dtype = encoder.dtype()
        count, documents, size = 0, 0, 0
        digest = hashlib.sha256()
        with (folder / "tokens.bin").open("wb") as file:
            for batch, ids in encoded(sources, encoder):
                data = np.fromiter(chain.from_iterable(ids), dtype=dtype)
                file.write(data.data)
                digest.update(data.astype("<u4").tobytes())
                count += len(data)
                documents += sum(piece.first for piece in batch)
                size += sum(len(piece.text.encode()) for piece in batch)
        counts = TokenCount(count, documents, size, "sha256:" + digest.hexdigest())
        write_atomic(folder / "tokens.json", json.dumps({"dtype": dtype, "count": asdict(counts)}))

    @staticmethod
    def digest_of(file: Path, dtype: np.dtype[Any]) -> str:
        """Return the digest of the tokens in a file, which does not depend on their dtype."""
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while data := opened.read(_READ * dtype.itemsize):
                digest.update(np.frombuffer(data, dtype=dtype).astype("<u4").tobytes())
        return "sha256:" + digest.hexdigest()

    @staticmethod
    def is_whole(folder: Path) -> bool:
        """Return whether `folder` holds as many tokens as its tokens.json says."""
        try:
            meta = json.loads((folder / "tokens.json").read_text())
            size = (folder / "tokens.bin").stat().st_size
        except (OSError, ValueError):
            return False
        return bool(size == meta["count"]["tokens"] * np.dtype(meta["dtype"]).itemsize)

    def take(self, count: int) -> Tokens:
        """Return the next blocks, (count, block_size) int64."""
        out = np.stack([self._block(index) for index in range(self._next, self._next + count)])
        self._next += count
        return out

    def _block(self, index: int) -> Tokens:
        # The count leaves room for any offset below block_size, so that all epochs have the same number of blocks.
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
        """Return the number of blocks taken and the digest of the tokens."""
        return {"blocks": self._next, "digest": self.count.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UsageError: the position belongs to other data.
        """
        if state.get("digest") != self.count.digest:
            raise UsageError(
                "The data changed since this run started, so it can't be resumed exactly.",
                "Restore the data, or start again with --restart.",
            )
        self._next = int(state["blocks"])
