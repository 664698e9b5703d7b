"""The interface between data and training: token blocks in a fixed order, and a position that can be saved."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer[Any]]


class BlockReader(Protocol):
    """An endless, deterministic supply of token blocks whose position can be saved and restored."""

    def take(self, count: int) -> Tokens:
        """Return the next blocks, (count, block_size) int64."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
