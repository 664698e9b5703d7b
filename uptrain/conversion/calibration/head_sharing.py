"""Share a layer's heads under the statistics of calibration text, and measure what each method explains of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, outer

from uptrain.conversion.calibration.statistics import GroupMoments
from uptrain.methods import joint_keys, joint_values
from uptrain.methods.distance_kernel import DistanceKernel, shares, uniform_distances
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.joint_keys import CENTRED, KeyMoments, LogitError, SharedKeys
from uptrain.methods.joint_values import OutputError, SharedValues, ValueMoments
from uptrain.methods.method import Converted, ExplainedEnergy
from uptrain.methods.rotary import Rotary
from uptrain.methods.shared_heads import SharedRows, absorb, share_keys, share_values, spans_of

FAR = 0.1
"""Share of evenly spread distances in a kernel: a text of few tokens says little of the far ones."""
ROUNDS = 8
"""Rounds of the alternated fits. Most is gained in the first three."""
CANDIDATES = 4
"""The most ways to share a layer's heads that are tried."""
CUTS = (0.75, 0.625, 0.5, 0.375, 0.25)
"""Shares of the rope pairs before the slow ones that are factored as if they were not rotated."""


@dataclass(frozen=True)
class _Fit:
    """One way to share a group's keys or values.

    - `shared`: (D, N), the map of the group's own stacked heads.
    - `ups`: (n, D, D), what each query head expands the shared head by.
    - `total`: the error of having no head at all.
    - `lost`: the error that each method makes.
    """

    shared: Tensor
    ups: Tensor
    total: float
    lost: dict[str, float]


def share_layer(
    layer: HeadMaps,
    groups: int,
    position: Rotary | None,
    inverse_frequencies: Tensor | None,
    moments: list[GroupMoments],
) -> Iterator[Converted[HeadMaps]]:
    """Yield ways to convert a layer to `groups` key/value heads under the statistics of a text, four or two.

    The first shares rotated keys with one component for each rope pair, and values under one moment for all heads. The
    others share values as each head averages them, and rotated keys from the start of least error, which may take slow
    pairs together; by the joint fit to all heads' distances; and by the joint fit to those of each head. The energy
    that `calibrated`, `svd` and `mean` explain is measured by the error that was fitted, in which `calibrated` is the
    best.

    - `layer`: the layer's projections by head, float64, the heads of each group next to each other.
    - `groups`: how many key/value heads the result has.
    - `position`: which key dims are rotated, None where keys see no rotation.
    - `inverse_frequencies`: (pairs,), radians per token, None where keys see no rotation.
    - `moments`: the statistics of each group.
    """
    ways: list[list[tuple[_Fit, _Fit]]] = []
    for span, each in zip(spans_of(layer.kv_heads, groups), moments, strict=True):
        keys = _keys(layer.k_rows[list(span)], each, position, inverse_frequencies)
        once, alternated = _values(layer.v_rows[list(span)], each.values)
        ways.append([(keys[0], once), *((fit, alternated) for fit in keys[1:])])
    for way in zip(*ways, strict=True):
        of_keys, of_values = zip(*way, strict=True)
        explained = {
            name: ExplainedEnergy(_explained(of_keys, name), _explained(of_values, name))
            for name in ("calibrated", "svd", "mean")
        }
        yield Converted(_absorbed(layer, of_keys, of_values), explained)


def _keys(rows: Tensor, group: GroupMoments, position: Rotary | None, inverse_frequencies: Tensor | None) -> list[_Fit]:
    """Return ways to share the keys of heads with maps `rows` (m, D, d̃): by eigenvectors, and further ones."""
    moments = group.keys
    centred = moments.keys - CENTRED * outer(moments.mean, moments.mean)
    starts = {
        "calibrated": _key_start(moments, centred, position),
        "svd": _key_start(replace(moments, queries=_eyes(moments.queries)), _noise(rows), position),
        "mean": SharedKeys(_mean(rows), _eyes(moments.queries)),
    }
    alone = LogitError(
        replace(moments, keys=centred, mean=torch.zeros_like(moments.mean)), DistanceKernel.far(position)
    )
    found = [_key_fit(alone, starts["calibrated"], starts)]
    if position is None or inverse_frequencies is None:
        return [*found, *found]  # nothing is better than eigenvectors where keys see no rotation
    slowest_first = inverse_frequencies.argsort(stable=True)
    cuts = dict.fromkeys(round(share * position.pairs) for share in CUTS)
    tried = [_key_start(moments, centred, position, slowest_first[: position.pairs - cut]) for cut in cuts]
    far = FAR * shares(uniform_distances(group.distances.shape[-1]))
    for distances in (group.distances.sum(0), group.distances):
        measured = (1 - FAR) * shares(distances) + far
        error = LogitError(moments, DistanceKernel.of(position, inverse_frequencies, measured))
        best = min((*starts.values(), *tried), key=error.of)
        if distances.ndim == 1:
            found.append(_key_fit(error, best, starts))
        *_, joint = joint_keys.alternated(error, best, ROUNDS)
        found.append(_key_fit(error, joint_keys.balanced(joint, position), starts))
    return found


def _key_start(
    moments: KeyMoments, second_moment: Tensor, position: Rotary | None, slow: Tensor | None = None
) -> SharedKeys:
    """Return the eigenvectors of a second moment (N, N) of stacked keys; see `shared_heads.share_keys`."""
    stacked = _stacked(second_moment, moments.queries)
    found = share_keys(stacked, _per_head(moments.queries, moments.heads), second_moment, position, slow)
    return SharedKeys(found.down, _by_query(found, moments.heads).mT)


def _values(rows: Tensor, moments: ValueMoments) -> tuple[_Fit, _Fit]:
    """Return the values of heads with maps `rows` (m, Dv, d̃) shared by eigenvectors, and by alternation from there."""
    together = replace(moments, values=moments.values.sum(0, keepdim=True))
    starts = {
        "calibrated": _value_start(moments, together.values[0]),
        "svd": _value_start(replace(moments, outputs=_eyes(moments.outputs)), _noise(rows)),
        "mean": SharedValues(_mean(rows), _eyes(moments.outputs)),
    }
    once = _value_fit(OutputError(together), starts["calibrated"], starts)
    error = OutputError(moments)
    best = min(starts.values(), key=error.of)
    *_, found = joint_values.alternated(error, best, ROUNDS)
    return once, _value_fit(error, found, starts)


def _value_start(moments: ValueMoments, second_moment: Tensor) -> SharedValues:
    """Return the eigenvectors of a second moment (N, N) of stacked values."""
    weights = _per_head(moments.outputs, moments.heads)
    found = share_values(_stacked(second_moment, moments.outputs), weights, second_moment)
    return SharedValues(found.down, _by_query(found, moments.heads))


def _key_fit(error: LogitError, chosen: SharedKeys, others: dict[str, SharedKeys]) -> _Fit:
    lost = {name: error.of(keys) for name, keys in (others | {"calibrated": chosen}).items()}
    return _Fit(chosen.shared, chosen.factors.mT, error.total, lost)


def _value_fit(error: OutputError, chosen: SharedValues, others: dict[str, SharedValues]) -> _Fit:
    lost = {name: error.of(values) for name, values in (others | {"calibrated": chosen}).items()}
    return _Fit(chosen.shared, chosen.factors, error.total, lost)


def _absorbed(layer: HeadMaps, keys: tuple[_Fit, ...], values: tuple[_Fit, ...]) -> HeadMaps:
    """Return the layer with each group's shared heads, and their factors in q and o."""

    def rows(heads: Tensor, fits: tuple[_Fit, ...]) -> Tensor:
        groups = heads.unflatten(0, (len(fits), -1))
        return torch.stack([fit.shared @ group.flatten(0, 1) for fit, group in zip(fits, groups, strict=True)])

    key_ups, value_ups = (torch.cat([fit.ups for fit in fits]) for fits in (keys, values))
    return absorb(layer, rows(layer.k_rows, keys), key_ups, rows(layer.v_rows, values), value_ups)


def _explained(fits: tuple[_Fit, ...], name: str) -> float:
    """Return the share of all groups' energy that a method explains."""
    total = sum(fit.total for fit in fits)
    return 1.0 - sum(fit.lost[name] for fit in fits) / total if total > 0 else 1.0


def _per_head(weights: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Sum the weights (n, D, D) of query heads over those that read each stacked head, (m, D, D)."""
    result = weights.new_zeros(max(heads) + 1, *weights.shape[1:])
    for head, weight in zip(heads, weights, strict=True):
        result[head] += weight
    return result


def _by_query(found: SharedRows, heads: tuple[int, ...]) -> Tensor:
    return torch.stack([found.ups[head] for head in heads])


def _stacked(second_moment: Tensor, weights: Tensor) -> Tensor:
    """Return the stacked heads' maps of themselves, (m, D, N)."""
    maps: Tensor = torch.eye(len(second_moment), dtype=second_moment.dtype).unflatten(0, (-1, weights.shape[-1]))
    return maps


def _eyes(weights: Tensor) -> Tensor:
    return torch.eye(weights.shape[-1], dtype=weights.dtype).expand_as(weights)


def _noise(rows: Tensor) -> Tensor:
    """Return the second moment (N, N) of heads with maps (m, D, d̃) where inputs are white noise."""
    flat = rows.flatten(0, 1)
    return flat @ flat.mT


def _mean(rows: Tensor) -> Tensor:
    """Return the mean of stacked heads with maps (m, D, d̃), as a map (D, N) of them."""
    heads, dims, _ = rows.shape
    return torch.eye(dims, dtype=rows.dtype).repeat(1, heads) / heads
