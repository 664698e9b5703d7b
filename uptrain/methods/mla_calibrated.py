"""Latents of a layer by what calibration text says of it: one for each weight of keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from uptrain.methods.energy import output_energy, rotated_energy
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.joint_keys import CENTRED
from uptrain.methods.low_rank import damped
from uptrain.methods.method import ExplainedEnergy
from uptrain.methods.mla import LatentShape, factor_latent, latent_maps, split_rotary
from uptrain.methods.mla_energy import LatentMoments, map_columns, per_key_head
from uptrain.methods.mla_fit import RotaryProblem
from uptrain.methods.mla_latent import Side, TwoMoments, alternate
from uptrain.methods.mla_layer import LatentMaps
from uptrain.methods.rotary import Rotary
from uptrain.methods.shared_heads import DAMPING

EXACT = 1e-9
"""The share of energy below which a latent that one closed form gives has nothing left to gain."""
ROUNDS = 10
"""Alternations of a latent without a rotary key, at most."""


def fitted_latents(
    layer: HeadMaps, shape: LatentShape, position: Rotary | None, moments: LatentMoments, key_weights: Sequence[float]
) -> Iterator[tuple[LatentMaps, ExplainedEnergy]]:
    """Yield a layer's latent for each of `key_weights`, and the energy that it explains.

    Each begins with the closed form of `factor_latent`, which weighs keys and values by one moment and each rope pair
    by itself. Then keys and values count by moments of their own, and rope pairs as the distances of attention mix
    them.

    - `layer`: the layer's projections by head, float64.
    - `shape`: the sizes of the result.
    - `position`: which key dims are rotated, None where keys see no rotation.
    - `moments`: of the layer on calibration text.
    - `key_weights`: weights of a share of key energy relative to a share of value energy.
    """
    weights = moments.weights(layer)
    first, explained = factor_latent(layer, shape, position, weights, key_weights[0])
    if not shape.nope or min(explained.keys, explained.values) > 1 - EXACT:
        yield first, explained
        return
    if not shape.rope.shares_key:
        yield from _plain(layer, shape, position if shape.rope.rotates else None, moments, key_weights)
        return
    if position is None:
        raise ValueError("a shared rotary key needs rotary positions")
    problem = RotaryProblem(layer, shape.pairs, position, moments)
    columns = map_columns(layer)
    start = first.k_rope if first.k_rope_bias is None else torch.cat([first.k_rope, first.k_rope_bias[:, None]], 1)
    key, factors = problem.rotary(start)
    for key_weight in key_weights:
        fit, explained = problem.fit(key, factors, shape.rank, key_weight)
        queries = layer.q_rows[:, problem.order]
        v_ups = fit.latent.v_ups.repeat_interleave(layer.queries_per_kv, 0)
        maps = latent_maps(
            layer,
            (queries * shape.factor**2, fit.factors.mT @ queries),
            (_whole(fit.latent.down, columns), _whole(fit.key, columns)),
            (fit.latent.k_ups, v_ups),
        )
        yield maps, explained


def cost_of_pairs(layer: HeadMaps, pairs: tuple[int, ...], position: Rotary, moments: LatentMoments) -> float:
    """Return the share of key energy that a shared rotary key loses, with each part of the rest that a latent may hold.

    - `layer`: the layer's projections by head, float64.
    - `pairs`: which of the source's rope pairs each pair of the shared rotary key has.
    - `position`: how the source's keys rotate: in every dim.
    - `moments`: of the layer on calibration text.
    """
    problem = RotaryProblem(layer, pairs, position, moments)
    key, _, _ = split_rotary(layer, pairs, position, moments.weights(layer))
    return problem.cost(*problem.rotary(key[:, map_columns(layer)]))


def _plain(
    layer: HeadMaps, shape: LatentShape, position: Rotary | None, moments: LatentMoments, key_weights: Sequence[float]
) -> Iterator[tuple[LatentMaps, ExplainedEnergy]]:
    """Yield latents that expand to plain heads, for each of `key_weights`."""
    columns = map_columns(layer)
    weights = per_key_head(layer, moments.queries)
    if position is not None:
        # Rotation mixes a pair's two dims evenly and separates pairs.
        weights = rotated_energy(weights, position)
    keys, values = Side(layer.k_rows[..., columns], weights), Side(layer.v_rows[..., columns], output_energy(layer))
    sigma, mean = moments.of_keys(columns)
    centred = damped(sigma, DAMPING) - (CENTRED if position is not None else 1.0) * torch.outer(mean, mean)
    two = TwoMoments.of(centred, damped(moments.values[columns, columns], DAMPING))
    totals = [max(part, 1e-30) for part in two.energies(keys, values)]
    for key_weight in key_weights:
        scale = totals[0] / (totals[1] * key_weight)
        weighed = Side(values.rows, values.weights * scale)
        fit = two.start(keys, weighed, shape.rank)
        fit = alternate(two, two.expand(fit.down, keys, weighed), keys, weighed, ROUNDS)
        lost = two.lost(fit, keys, weighed)
        maps = latent_maps(
            layer,
            (layer.q_rows, layer.q_rows[:, :0]),
            (_whole(fit.down, columns), layer.k_rows[0, :0]),
            (fit.k_ups, fit.v_ups),
        )
        yield maps, ExplainedEnergy(1 - lost[0] / totals[0], 1 - lost[1] / (scale * totals[1]))


def _whole(rows: Tensor, columns: slice) -> Tensor:
    """Return a map of all of x̃ from one of some `columns`: without the last, of zeros there."""
    return rows if columns == slice(None) else pad(rows, (0, 1))
