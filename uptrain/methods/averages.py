"""The second moment of what attention averages, in the order of products that costs least."""

from __future__ import annotations

import torch
from torch import Tensor


class AveragedMoment:
    """Gathers Σ_h Σ_t x̄ x̄ᵀ of x̄ = Σ_s p_h[t, s] x̃_s over `heads` heads, some queries t at a time."""

    def __init__(self, rows: Tensor, heads: int) -> None:
        """Begin for one block's inputs x̃ (T, d̃), float32."""
        tokens, width = rows.shape
        self._rows = rows
        # Xᵀ (Σ_h P_hᵀ P_h) X: wide models have more columns than a block has tokens.
        self._by_tokens = tokens * (heads * tokens + tokens + width) < heads * width * (tokens + width)
        size = tokens if self._by_tokens else width
        self._sum = rows.new_zeros(size, size) if self._by_tokens else torch.zeros(size, size, dtype=torch.float64)

    def add(self, probabilities: Tensor) -> None:
        """Take in the probabilities (H, R, T) of R queries, float32."""
        if self._by_tokens:
            flat = probabilities.flatten(0, 1)
            self._sum.addmm_(flat.mT, flat)
        else:
            mixed = (probabilities @ self._rows).flatten(0, 1)
            self._sum += (mixed.mT @ mixed).cpu().double()

    def moment(self) -> Tensor:
        """Return what was gathered, (d̃, d̃) float64 on the CPU."""
        if self._by_tokens:
            return (self._rows.mT @ (self._sum @ self._rows)).cpu().double()
        return self._sum
