"""The second moment of what attention averages, in the order of products that costs least."""

from __future__ import annotations

from torch import Tensor


def averaged_moment(probabilities: Tensor, rows: Tensor) -> Tensor:
    """Return Σ_h Σ_t x̄ x̄ᵀ, (d̃, d̃) float64 on the CPU, of x̄ = Σ_s p_h[t, s] x̃_s.

    `probabilities` are (H, T, T) and `rows` the inputs x̃ (T, d̃), both float32.
    """
    heads, tokens, _ = probabilities.shape
    width = rows.shape[1]
    if tokens * (heads * tokens + tokens + width) < heads * width * (tokens + width):
        # Xᵀ (Σ_h P_hᵀ P_h) X: wide models have more columns than a block has tokens.
        flat = probabilities.flatten(0, 1)
        return (rows.mT @ ((flat.mT @ flat) @ rows)).double().cpu()
    mixed = (probabilities @ rows).flatten(0, 1)
    moment: Tensor = (mixed.mT @ mixed).double().cpu()
    return moment
