"""Blocks of a streamed dataset, tokenised while they are read; no tokens are written to disk."""

from __future__ import annotations

from typing import Any

import numpy as np

from uptrain.data.block_reader import Tokens
from uptrain.data.dataset_rows import dataset_texts, open_dataset
from uptrain.data.row_text import RowText
from uptrain.data.sources import Dataset
from uptrain.data.text_encoder import TextEncoder
from uptrain.data.token_text import BATCH_CHARACTERS
from uptrain.errors import UptrainError


class TokenStream:
    """Reads blocks from a streamed dataset in the dataset's order."""

    def __init__(self, source: Dataset, encoder: TextEncoder, block_size: int) -> None:
        self.source, self.encoder, self.block_size = source, encoder, block_size
        self._text = RowText(source, encoder.renderer_for([source]))
        self._dataset = open_dataset(source)
        self._rows = dataset_texts(self._dataset, source, self._text)
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
            self._rows = dataset_texts(self._dataset, self.source, self._text)
        for ids in self.encoder.tokens_of(texts) if texts else ():
            self._pending += ids + self.encoder.separator
        self._in_epoch += len(texts)

    def state_dict(self) -> dict[str, Any]:
        """Return the dataset's position and the tokens that were read but not taken yet."""
        inner = self._dataset.state_dict()
        return {"dataset": inner, "epoch": self._epoch, "rows": self._in_epoch, "pending": list(self._pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position without reading the rows before it."""
        self._dataset.load_state_dict(state["dataset"])
        self._rows = dataset_texts(self._dataset, self.source, self._text)
        self._epoch, self._in_epoch = int(state["epoch"]), int(state["rows"])
        self._pending = list(state["pending"])
