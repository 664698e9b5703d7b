"""Blocks from several sources, each with its share of them, in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from uptrain.data.block_reader import BlockReader, Tokens
from uptrain.errors import UsageError

_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio. Source: Knuth, The Art of Computer Programming, volume 3, section 6.4."""


class Mixture:
    """Blocks of several readers, each block from one of them.

    Multiples of the golden ratio, which choose the source, spread evenly: any stretch of blocks holds every source's
    share to within a few blocks, where independent draws would stray by the square root of the stretch's length.
    """

    def __init__(self, readers: Sequence[BlockReader], weights: Sequence[float], seed: int) -> None:
        self.readers = list(readers)
        self.shares = [weight / sum(weights) for weight in weights]
        self._bounds = np.cumsum(self.shares)[:-1]
        self._offset = np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
        self._next = 0

    def source_of(self, blocks: Tokens) -> Tokens:
        """Return which reader each block comes from, by the block's index."""
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
        """Return the number of blocks taken, the shares, and every reader's own position."""
        states = [reader.state_dict() for reader in self.readers]
        return {"blocks": self._next, "shares": self.shares, "readers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UsageError: the position belongs to another mixture, or to other data.
        """
        if state.get("shares") != self.shares:
            raise UsageError(
                "The weights in data changed since this run started, so it can't be resumed exactly.",
                "Restore them, or start anew with --restart.",
            )
        self._next = int(state["blocks"])
        for reader, own in zip(self.readers, state["readers"], strict=True):
            reader.load_state_dict(own)
