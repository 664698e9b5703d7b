"""Where a document ends and the next one begins in a block of tokens, and the positions that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uptrain.data.block_reader import Tokens
from uptrain.data.text_encoder import TextEncoder


@dataclass(frozen=True)
class Boundary:
    """The token between two documents. `ends` is true where it ends a document, false where it begins one."""

    token: int
    ends: bool

    @staticmethod
    def of(encoder: TextEncoder) -> Boundary | None:
        """Return the boundary that the encoder's separator makes between documents, or None where there is none."""
        separator = encoder.separator
        return Boundary(separator[0], separator[0] == encoder.tokenizer.eos_token_id) if separator else None

    def starts(self, blocks: Tokens) -> NDArray[np.bool_]:
        """Return where a document begins inside blocks (n, T); a block's own first token is not marked."""
        starts = np.zeros(blocks.shape, dtype=np.bool_)
        starts[:, 1:] = blocks[:, :-1] == self.token if self.ends else blocks[:, 1:] == self.token
        return starts


def positions_of(starts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return positions (n, T) that begin at 0 in each document, from where documents start inside blocks (n, T)."""
    index = np.broadcast_to(np.arange(starts.shape[1]), starts.shape)
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
