"""Fewer key/value heads by factoring: `svd` (weights alone) and `calibrated` (weights and text)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.methods.energy import LayerWeights, explained_energy, layer_weights
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import damped, factor, matrix_root
from uptrain.methods.method import Converted, ExplainedEnergy
from uptrain.methods.rotary import Rotary, to_complex

DAMPING = 1e-3
"""Default damping of a measured second moment, relative to its mean diagonal: right for a few thousand tokens."""


@dataclass(frozen=True)
class SharedRows:
    """One group's shared rows `down` (D, d̃), and for each of its heads the factor (D, D) that expands them again."""

    down: Tensor
    ups: list[Tensor]


def factor_heads(
    layer: HeadMaps,
    groups: int,
    position: Rotary | None,
    second_moment: Tensor | None = None,
    damping: float = DAMPING,
) -> Converted[HeadMaps]:
    """Convert a layer to `groups` key/value heads by factoring each group; queries and output absorb the factors.

    As many groups as heads return the layer itself. Under its own weights the result never explains less than `mean`
    or `first`, which are points of the set that it minimises over.

    - `layer`: the layer's projections by head, float64.
    - `groups`: how many key/value heads the result has.
    - `position`: which key dims are rotated, None where keys see no rotation.
    - `second_moment`: (d+1, d+1), E[x̃x̃ᵀ] of the layer's input x̃ = [x; 1]. The method is `calibrated` with it, and the
      data-free `svd` without.
    - `damping`: what is added to the diagonal of the second moment, relative to its mean.

    Raises:
        ValueError: `groups` does not divide the layer's key/value heads.

    Source: Ainslie et al. 2023, section 2.1 for the grouping; `low_rank.factor` for the factorisation.
    """
    if layer.kv_heads % groups:
        raise ValueError(f"groups {groups} does not divide {layer.kv_heads} key/value heads")
    sigma = None if second_moment is None else damped(second_moment, damping)
    weights = layer_weights(layer, position, sigma)
    name = "svd" if second_moment is None else "calibrated"
    if groups == layer.kv_heads:
        return Converted(layer, {kind: ExplainedEnergy(1.0, 1.0) for kind in (name, "mean", "first")})
    spans = spans_of(layer.kv_heads, groups)
    keys = [share_keys(layer, weights, span, position) for span in spans]
    values = [share_values(layer, weights, span) for span in spans]
    converted = absorb(layer, keys, values)
    explained = {
        name: explained_energy(layer, weights, expand(keys), expand(values)),
        "mean": pooled_energy(layer, weights, groups, "mean"),
        "first": pooled_energy(layer, weights, groups, "first"),
    }
    return Converted(converted, explained)


def spans_of(heads: int, groups: int) -> list[range]:
    """Return the heads of each group: neighbours, as `repeat_kv` has them."""
    size = heads // groups
    return [range(start, start + size) for start in range(0, heads, size)]


def pooled_energy(layer: HeadMaps, weights: LayerWeights, groups: int, how: str) -> ExplainedEnergy:
    """Return the energy that `mean` or `first` pooling explains, under the weights of a factorisation.

    - `layer`: the layer's projections by head.
    - `weights`: how much errors count.
    - `groups`: how many key/value heads pooling leaves.
    - `how`: `mean` or `first`.

    Source: Ainslie et al. 2023, section 2.1 and figure 5.
    """
    return explained_energy(
        layer, weights, pooled_rows(layer.k_rows, groups, how), pooled_rows(layer.v_rows, groups, how)
    )


def pooled_rows(rows: Tensor, groups: int, how: str) -> Tensor:
    """Return what each head (G₀, D, d̃) sees of its group's `mean` or `first`, in the same shape.

    Source: Ainslie et al. 2023, section 2.1 and figure 5.
    """
    grouped = rows.unflatten(0, (groups, len(rows) // groups))
    one: Tensor = grouped.mean(1) if how == "mean" else grouped[:, 0]
    return one.repeat_interleave(len(rows) // groups, 0)


def share_values(layer: HeadMaps, weights: LayerWeights, span: range) -> SharedRows:
    """Factor the values of the heads in `span` into one shared head."""
    rows = layer.v_rows
    left = None if weights.second_moment is None else [matrix_root(weights.values[g]) for g in span]
    found = factor([rows[g] for g in span], left, weights.second_moment, rows.shape[1])
    return SharedRows(found.down, found.ups)


def share_keys(layer: HeadMaps, weights: LayerWeights, span: range, position: Rotary | None) -> SharedRows:
    """Factor the keys of a group's heads into one shared head.

    Each rotated pair is factored alone, because only a complex scalar commutes with its rotation. The other dims are
    factored as one.

    - `layer`: the layer's projections by head.
    - `weights`: how much errors count.
    - `span`: the group's heads.
    - `position`: which key dims are rotated, None where keys see no rotation.
    """
    rows = layer.k_rows
    dims = rows.shape[1]
    rotated = 0 if position is None else position.dims
    down = torch.zeros_like(rows[0])
    ups = [torch.zeros(dims, dims, dtype=rows.dtype) for _ in span]
    if position is not None:
        real, imaginary = position.indices()
        pairs = to_complex(rows, position)
        for pair, (i, j) in enumerate(zip(real.tolist(), imaginary.tolist(), strict=True)):
            left = [matrix_root(weights.keys[g, i : i + 1, i : i + 1]) for g in span]
            found = factor([pairs[g, pair : pair + 1] for g in span], left, weights.second_moment, 1)
            down[i], down[j] = found.down[0].real, found.down[0].imag
            for up, value in zip(ups, found.ups, strict=True):
                up[i, i] = up[j, j] = value[0, 0].real
                up[j, i] = value[0, 0].imag
                up[i, j] = -value[0, 0].imag
    if rotated < dims:
        rest = slice(rotated, None)
        left = [matrix_root(weights.keys[g, rest, rest]) for g in span]
        found = factor([rows[g, rest] for g in span], left, weights.second_moment, dims - rotated)
        down[rest] = found.down
        for up, block in zip(ups, found.ups, strict=True):
            up[rest, rest] = block
    return SharedRows(down, ups)


def expand(groups: list[SharedRows]) -> Tensor:
    """Return the rows that each head sees of its group's shared ones, (G₀, D, d̃)."""
    return torch.stack([up @ group.down for group in groups for up in group.ups])


def absorb(layer: HeadMaps, keys: list[SharedRows], values: list[SharedRows]) -> HeadMaps:
    """Return the layer with each head's expansion in q and o: qᵀ (B s) = (Bᵀ q)ᵀ s, and W_o (B s) = (W_o B) s."""
    per = layer.queries_per_kv
    key_ups = torch.stack([up for group in keys for up in group.ups]).repeat_interleave(per, 0)
    value_ups = torch.stack([up for group in values for up in group.ups]).repeat_interleave(per, 0)
    return layer.with_rows(
        q_rows=key_ups.mT @ layer.q_rows,
        k_rows=torch.stack([group.down for group in keys]),
        v_rows=torch.stack([group.down for group in values]),
        o=torch.einsum("ohv,hvw->ohw", layer.o, value_ups),
    )
