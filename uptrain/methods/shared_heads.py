"""Fewer key/value heads by factoring: `svd` (weights alone) and `calibrated` (weights and text)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uptrain.methods.energy import LayerWeights, explained_energy, layer_weights
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import Factored, damped, factor, matrix_root
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
    k_rows, v_rows = layer.k_rows, layer.v_rows
    keys = [share_keys(k_rows[list(span)], weights.keys[list(span)], sigma, position) for span in spans]
    values = [share_values(v_rows[list(span)], weights.values[list(span)], sigma) for span in spans]
    converted = absorb(
        layer,
        torch.stack([group.down for group in keys]), _by_query(layer, keys),
        torch.stack([group.down for group in values]), _by_query(layer, values),
    )  # fmt: skip
    explained = {
        name: explained_energy(layer, weights, expand(keys), expand(values)),
        "mean": pooled_energy(layer, weights, groups, "mean"),
        "first": pooled_energy(layer, weights, groups, "first"),
    }
    return Converted(converted, explained)


def factor_normed(layer: HeadMaps, groups: int) -> Converted[HeadMaps]:
    """Convert a layer whose keys are normed to `groups` key/value heads: keys averaged, values factored by weights.

    A norm after the keys' projection leaves no factor for queries to absorb. Values pass no norm. As many groups as
    heads return the layer itself.

    Raises:
        ValueError: `groups` does not divide the layer's key/value heads.

    Source: Ainslie et al. 2023, section 2.1 for the keys; `low_rank.factor` for the values.
    """
    if layer.kv_heads % groups:
        raise ValueError(f"groups {groups} does not divide {layer.kv_heads} key/value heads")
    whole = ExplainedEnergy(1.0, 1.0)
    if groups == layer.kv_heads:
        return Converted(layer, dict.fromkeys(("svd", "mean", "first"), whole))
    weights, v_rows = layer_weights(layer, None, None), layer.v_rows
    spans = spans_of(layer.kv_heads, groups)
    values = [share_values(v_rows[list(span)], weights.values[list(span)], None) for span in spans]
    value_ups, keys = _by_query(layer, values), pooled_rows(layer.k_rows, groups, "mean")
    converted = layer.with_rows(
        k_rows=keys[:: layer.kv_heads // groups],
        v_rows=torch.stack([group.down for group in values]),
        o=torch.einsum("ohv,hvw->ohw", layer.o, value_ups),
    )
    pooled = {how: pooled_energy(layer, weights, groups, how) for how in ("mean", "first")}
    return Converted(converted, {"svd": explained_energy(layer, weights, keys, expand(values)), **pooled})


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


def share_values(rows: Tensor, weights: Tensor, second_moment: Tensor | None) -> SharedRows:
    """Factor the values of a group's heads into one shared head.

    - `rows`: (m, Dv, d̃), the heads' maps.
    - `weights`: (m, Dv, Dv), how much their errors count.
    - `second_moment`: (d̃, d̃) of what the maps read, None for the identity.
    """
    found = _factored(rows, None if second_moment is None else weights, second_moment, rows.shape[1])
    return SharedRows(found.down, found.ups)


def share_keys(
    rows: Tensor, weights: Tensor, second_moment: Tensor | None, position: Rotary | None, slow: Tensor | None = None
) -> SharedRows:
    """Factor the keys of a group's heads into one shared head.

    Each rotated pair is factored alone, because only a complex scalar commutes with its rotation. The other dims are
    factored as one.

    - `rows`: (m, D, d̃), the heads' maps.
    - `weights`: (m, D, D), how much their errors count; a pair factored alone has the mean of its two dims.
    - `second_moment`: (d̃, d̃) of what the maps read, None for the identity.
    - `position`: which key dims are rotated, None where keys see no rotation.
    - `slow`: rope pairs, the slowest first, that are factored together with the unrotated dims as if they were not
      rotated; the strongest components become the slowest dims. None for none.
    """
    dims = rows.shape[1]
    down, ups = torch.zeros_like(rows[0]), rows.new_zeros(len(rows), dims, dims)
    together = torch.arange(0 if position is None else position.dims, dims)
    if position is not None:
        real, imaginary = position.indices()
        pairs = to_complex(rows, position)
        slow = torch.zeros(0, dtype=torch.int64) if slow is None else slow
        for pair in sorted(set(range(position.pairs)) - set(slow.tolist())):
            i, j = real[pair], imaginary[pair]
            energy = (weights[:, i, i] + weights[:, j, j]) / 2
            found = _factored(pairs[:, pair : pair + 1], energy[:, None, None], second_moment, 1)
            down[i], down[j] = found.down[0].real, found.down[0].imag
            factor_of = torch.stack(found.ups)[:, 0, 0]
            ups[:, i, i] = ups[:, j, j] = factor_of.real
            ups[:, j, i], ups[:, i, j] = factor_of.imag, -factor_of.imag
        together = torch.cat([together, torch.stack([real[slow], imaginary[slow]], dim=1).flatten()])
    if len(together):
        block = together[:, None], together[None]
        found = _factored(rows[:, together], weights[:, *block], second_moment, len(together))
        down[together] = found.down
        ups[:, *block] = torch.stack(found.ups)
    return SharedRows(down, list(ups))


def _factored(rows: Tensor, weights: Tensor | None, second_moment: Tensor | None, rank: int) -> Factored:
    """Factor the heads' rows (m, n, d̃) as `factor` does, in the inputs alone that any of them reads."""
    left = None if weights is None else [matrix_root(weight) for weight in weights]
    read = (rows != 0).any(0).any(0)
    if second_moment is None or read.all():
        return factor(list(rows), left, second_moment, rank)
    places = read.nonzero()[:, 0]
    found = factor(list(rows[..., places]), left, second_moment[places[:, None], places[None]], rank)
    down = rows.new_zeros(rank, rows.shape[-1])
    down[:, places] = found.down
    return replace(found, down=down)


def expand(groups: list[SharedRows]) -> Tensor:
    """Return the rows that each head sees of its group's shared ones, (G₀, D, d̃)."""
    return torch.stack([up @ group.down for group in groups for up in group.ups])


def absorb(layer: HeadMaps, keys: Tensor, key_ups: Tensor, values: Tensor, value_ups: Tensor) -> HeadMaps:
    """Return the layer with each head's expansion in q and o: qᵀ (B s) = (Bᵀ q)ᵀ s, and W_o (B s) = (W_o B) s.

    - `layer`: the layer's projections by head.
    - `keys`, `values`: (G, D, d̃) and (G, Dv, d̃), the shared heads' maps of x̃.
    - `key_ups`, `value_ups`: (H, D, D) and (H, Dv, Dv), what each query head expands them by.
    """
    return layer.with_rows(
        q_rows=key_ups.mT @ layer.q_rows,
        k_rows=keys,
        v_rows=values,
        o=torch.einsum("ohv,hvw->ohw", layer.o, value_ups),
    )


def _by_query(layer: HeadMaps, groups: list[SharedRows]) -> Tensor:
    """Return each query head's factor, (H, D, D)."""
    return torch.stack([up for group in groups for up in group.ups]).repeat_interleave(layer.queries_per_kv, 0)
