"""Blocks of a streamed dataset, tokenised while they are read; no tokens are written to disk."""

from __future__ import annotations

from typing import Any

import numpy as np

from uptrain.data.block_reader import Tokens
from uptrain.data.documents import open_dataset, rows
from uptrain.data.sources import Dataset
from uptrain.data.token_text import BATCH_CHARACTERS, encode, renderer_for, separator_of
from uptrain.errors import UptrainError


class TokenStream:
    """Reads blocks from a streamed dataset in the dataset's order."""

    def __init__(self, source: Dataset, tokenizer: Any, block_size: int) -> None:
        self.source, self.tokenizer, self.block_size = source, tokenizer, block_size
        self._render = renderer_for([source], tokenizer)
        self._dataset = open_dataset(source)
        self._rows = rows(self._dataset, source, self._render)
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
        while sum(map(len, texts)) < BATCH_CHARACTERS // 16 and len(texts) < 64:
            text = next(self._rows, None)
            if text is None:
                break
            texts.append(text)
        if not texts:
            if not self._in_epoch:
                raise UptrainError(f"The dataset {self.source.dataset} has no rows in {self.source.split}.")
            self._epoch, self._in_epoch = self._epoch + 1, 0
            self._rows = rows(self._dataset, self.source, self._render)
        for ids in encode(self.tokenizer, texts) if texts else ():
            self._pending += ids + self._separator
        self._in_epoch += len(texts)

    def state_dict(self) -> dict[str, Any]:
        """Return the dataset's position and the tokens that were read but not taken yet."""
        inner = self._dataset.state_dict()
        return {"dataset": inner, "epoch": self._epoch, "rows": self._in_epoch, "pending": list(self._pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position without reading the rows before it."""
        self._dataset.load_state_dict(state["dataset"])
        self._rows = rows(self._dataset, self.source, self._render)
        self._epoch, self._in_epoch = int(state["epoch"]), int(state["rows"])
        self._pending = list(state["pending"])
