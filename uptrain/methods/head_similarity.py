"""How alike the heads are that come to share one: as stored, and after the changes that attention can't see.

In numpy, as `estimate`, whose measure of two heads this is: `uptrain inspect --plot` draws it pair by pair.
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
"""Pairs of a group that are compared; of more, so many evenly spread ones."""

Kept = Callable[[energy_numpy.Floats], float]
"""Says of two heads' rows (2, D, d̃) which share of their energy one head keeps."""


def one_key(position: Position, spec: AttentionSpec) -> Kept:
    """Return what says how much of two key heads one keeps: where they rotate, only a phase a frequency is free."""
    if not position.rotates or spec.rotary_ndims == 0:
        return one_value
    interleaved, dims = position is Position.ROTARY_INTERLEAVED, spec.rotary_ndims or spec.head_dim
    return lambda pair: energy_numpy.kept_by_phases(pair, 1, interleaved, dims)


def one_value(pair: energy_numpy.Floats) -> float:
    """Return how much of two value heads (2, D, d̃), or of keys that don't rotate, one keeps."""
    return energy_numpy.kept_by_factor(pair, 1)


def head_similarity(
    layer: LayerHeads, groups: int, position: Position, spec: AttentionSpec, align: bool
) -> dict[str, dict[str, float]]:
    """Return how alike the heads of each of `groups` groups are on average: `stored` and, with `align`, `aligned`.

    Two heads are maps A, B (head_dim, hidden_size + 1) of x̃ = [x; 1]. Their similarity is the share of their energy
    ‖A‖² + ‖B‖² that a single head in their place keeps: 1 for equal ones, ½ for those with nothing in common.

    - stored, it is their average: ‖A + B‖² / 2(‖A‖² + ‖B‖²) = ½ + ⟨A, B⟩ / (‖A‖² + ‖B‖²);
    - aligned, the best one after any change that queries and output absorb, which for values and unrotated keys is an
      invertible matrix: Σ_{i ≤ head_dim} σ_i² / Σ_i σ_i², σ the singular values of A stacked on B. A rotated key may
      be changed by one complex factor a frequency j: Σ_j λ_j / (‖A‖² + ‖B‖²), λ_j the larger eigenvalue of the Gram
      matrix of the complex rows a_j, b_j. It is never less than stored.

    Keys and values each, computed in float64 and rounded to four digits.

    Source: Eckart & Young 1936 for the best shared head; Jin et al. 2024, "Align Attention Heads Before Merging Them",
    for comparing heads before and after alignment, there by orthogonal matrices.
    """
    sides = {"keys": layer.part("k"), "values": layer.part("v")}
    kinds: dict[str, dict[str, Kept]] = {"stored": dict.fromkeys(sides, _average)}
    if align:
        kinds["aligned"] = {"keys": one_key(position, spec), "values": one_value}
    return {
        kind: {side: round(_mean(heads, groups, measures[side]), 4) for side, heads in sides.items()}
        for kind, measures in kinds.items()
    }


def _average(pair: energy_numpy.Floats) -> float:
    return energy_numpy.kept_by_mean(pair, 1)


def _mean(heads: Heads, groups: int, kept: Kept) -> float:
    chosen, runs = _pairs(len(heads.weight) // groups), energy_numpy.rows_by_group(heads, groups)
    return float(np.mean([kept(run[list(pair)].astype(np.float64)) for run in runs for pair in chosen]))


def _pairs(heads: int) -> list[tuple[int, int]]:
    found = list(combinations(range(heads), 2))
    return found[:: -(-len(found) // PAIRS)]
