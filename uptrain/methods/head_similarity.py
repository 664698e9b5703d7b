"""The similarity of the heads that come to share one: as stored, and after changes that do not change attention.

In numpy, by the measure of `energy_numpy`. `uptrain inspect --plot` draws it pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.projections import Heads, LayerHeads
from uptrain.architectures.schema import Position
from uptrain.methods import energy_numpy

PAIRS = 64
"""The most pairs per group that are compared; of more pairs, this many, evenly spaced."""

PairMeasure = Callable[[energy_numpy.Floats], float]
"""Returns the share of two heads' energy that one head explains, from their rows (2, D, d̃)."""


def one_key(position: Position, spec: AttentionSpec) -> PairMeasure:
    """Return the measure for key heads: where keys rotate, heads may differ by a phase per rotary pair and no more."""
    if not position.rotates or spec.rotary_ndims == 0:
        return one_value
    interleaved, dims = position is Position.ROTARY_INTERLEAVED, spec.rotary_ndims or spec.head_dim
    return lambda pair: energy_numpy.explained_by_phases(pair, 1, interleaved, dims)


def one_value(pair: energy_numpy.Floats) -> float:
    """Return the share of energy that one head explains of two value heads, or two unrotated key heads, (2, D, d̃)."""
    return energy_numpy.explained_by_factor(pair, 1)


def head_similarity(
    layer: LayerHeads, groups: int, position: Position, spec: AttentionSpec, align: bool
) -> dict[str, dict[str, float]]:
    """Return the mean similarity of the heads within groups, `stored` and, with `align`, `aligned`; of keys and values.

    Two heads are maps A, B (head_dim, hidden_size + 1) of x̃ = [x; 1]. Their similarity is the share of their energy
    ‖A‖² + ‖B‖² that a single head explains: 1 for equal heads, ½ for heads that have nothing in common.

    - `stored`: the single head is their average: ‖A + B‖² / 2(‖A‖² + ‖B‖²) = ½ + ⟨A, B⟩ / (‖A‖² + ‖B‖²).
    - `aligned`: it is the best head after any change that queries and output absorb. For values and unrotated keys the
      change is an invertible matrix: Σ_{i ≤ head_dim} σ_i² / Σ_i σ_i², σ the singular values of A stacked on B. For
      rotated keys it is one complex factor per rotary pair j: Σ_j λ_j / (‖A‖² + ‖B‖²), λ_j the larger eigenvalue of
      the Gram matrix of the complex rows a_j, b_j. `aligned` is never less than `stored`.

    Computed in float64 and rounded to four digits.

    Parameters:

    - `layer`: the layer's heads; keys and values are read.
    - `groups`: how many groups of neighbours the heads form.
    - `position`: how attention learns where a token stands.
    - `spec`: the layer's attention.
    - `align`: whether heads may be changed before they are compared.

    Source: Eckart & Young 1936 for the best shared head; Jin et al. 2024, "Align Attention Heads Before Merging Them",
    for comparing heads before and after alignment, there by orthogonal matrices.
    """
    sides = {"keys": layer.part("k"), "values": layer.part("v")}
    kinds: dict[str, dict[str, PairMeasure]] = {"stored": dict.fromkeys(sides, _average)}
    if align:
        kinds["aligned"] = {"keys": one_key(position, spec), "values": one_value}
    return {
        kind: {side: round(_mean(heads, groups, measures[side]), 4) for side, heads in sides.items()}
        for kind, measures in kinds.items()
    }


def _average(pair: energy_numpy.Floats) -> float:
    return energy_numpy.explained_by_mean(pair, 1)


def _mean(heads: Heads, groups: int, measure: PairMeasure) -> float:
    chosen, runs = _pairs(len(heads.weight) // groups), energy_numpy.rows_by_group(heads, groups)
    return float(np.mean([measure(run[list(pair)].astype(np.float64)) for run in runs for pair in chosen]))


def _pairs(heads: int) -> list[tuple[int, int]]:
    found = list(combinations(range(heads), 2))
    return found[:: -(-len(found) // PAIRS)]
