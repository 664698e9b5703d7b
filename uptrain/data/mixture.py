"""Blocks from several sources in the proportion of their weights, in an order that the seed determines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from uptrain.data.block_reader import BlockReader, Tokens
from uptrain.errors import UsageError

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio. Source: Knuth, The Art of Computer Programming, volume 3, section 6.4."""


class Mixture:
    """Reads blocks from several readers, each block from one of them.

    Multiples of the golden ratio choose the reader. They are spread evenly, so any stretch of blocks has each
    source's share to within a few blocks. Independent random draws would deviate by the square root of its length.

    - `readers`: one reader per source.
    - `weights`: their shares, in any unit.
    - `seed`: determines the order.
    """

    def __init__(self, readers: Sequence[BlockReader], weights: Sequence[float], seed: int) -> None:
        self.readers = list(readers)
        self.shares = [weight / sum(weights) for weight in weights]
        self._bounds = np.cumsum(self.shares)[:-1]
        self._offset = np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
        self._next = 0

    def source_of(self, blocks: Tokens) -> Tokens:
        """Return the index of the reader that each block comes from; `blocks` holds the blocks' indices."""
        points = (blocks.astype(np.uint64) * np.uint64(_GOLDEN) + self._offset) / 2.0**64
        return np.searchsorted(self._bounds, points, side="right")

    def take(self, count: int) -> Tokens:
        """Return the next blocks, (count, block_size) int64."""
        chosen = self.source_of(np.arange(self._next, self._next + count))
        parts = {index: self.readers[index].take(int((chosen == index).sum())) for index in np.unique(chosen)}
        out = np.empty((count, next(iter(parts.values())).shape[1]), dtype=np.int64)
        for index, blocks in parts.items():
            out[chosen == index] = blocks
        self._next += count
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return the number of blocks taken, the shares, and the position of every reader."""
        states = [reader.state_dict() for reader in self.readers]
        return {"blocks": self._next, "shares": self.shares, "readers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UsageError: the position belongs to a mixture with other weights, or to other data.
        """
        if state.get("shares") != self.shares:
            raise UsageError(
                "The weights in data changed since this run started, so it can't be resumed exactly.",
                "Restore them, or start again with --restart.",
            )
        self._next = int(state["blocks"])
        for reader, own in zip(self.readers, state["readers"], strict=True):
            reader.load_state_dict(own)
