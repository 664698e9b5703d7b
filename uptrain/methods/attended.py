"""The calibrated factorisation: keys and values weighed by the attention they really receive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.methods.averages import AveragedMoment
from uptrain.methods.energy import (
    LayerWeights,
    Shares,
    layer_weights,
    output_energy,
    rotated_energy,
    weighted_energy,
)
from uptrain.methods.factor import damped
from uptrain.methods.factored import (
    DAMPING,
    SharedRows,
    absorb,
    expand,
    pooled_rows,
    share_keys,
    share_values,
    spans_of,
)
from uptrain.methods.heads import HeadMaps
from uptrain.methods.layered import Layer, Parameters
from uptrain.methods.rotary import Rotary

CENTRED = 0.95
"""Share of the keys' mean that is taken out of their moment: softmax doesn't feel what all keys have in common."""


@dataclass(frozen=True)
class Moments:
    """Hold what calibration text says of a layer, float64, x̃ = [x; 1], d̃ = d + 1, G groups, G₀ source heads.

    `keys` (G, d̃, d̃) is Σ_t r_t x̃_t x̃_tᵀ with r the sensitivity p(1 − p) that key t receives from the group's
    queries; `queries` (G₀, D, D) is Σ_t s_t q_t q_tᵀ / D with s the same summed over keys; `values` (G, d̃, d̃) is
    Σ_t x̄_t x̄_tᵀ of the inputs as attention averages them.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor


@torch.no_grad()
def gather_moments(
    layer: Layer, maps: HeadMaps, parameters: Parameters, groups: int, hidden: Iterable[Tensor]
) -> Moments:
    """Gather a layer's moments over blocks of hidden states (T, d), each run through the source's attention.

    `parameters` are `maps`, the source's heads in the order they are grouped in, as the module takes them.

    A key error δ moves logit (t, s) by q_tᵀδ_s, and the softmax answers with p(1 − p) at that entry.
    Source: the derivative of softmax, ∂p_s/∂z_s = p_s (1 − p_s).
    """
    size, width = maps.q.shape[1], maps.q.shape[2] + 1
    per_group, per_head = maps.query_heads // groups, maps.queries_per_kv
    keys = torch.zeros(groups, width, width, dtype=torch.float64)
    values = torch.zeros_like(keys)
    queries = torch.zeros(maps.query_heads, size, size, dtype=torch.float64)
    tokens = 0
    for block in hidden:
        x, parts = layer.attention_weights(block, parameters)
        rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        averaged = [AveragedMoment(rows, per_group) for _ in range(groups)]
        received, given = rows.new_zeros(maps.query_heads, len(rows)), list[Tensor]()
        for probabilities in parts:
            for moment, heads in zip(averaged, probabilities.split(per_group), strict=True):
                moment.add(heads)
            # In their place: nothing else needs them any more, and they may be larger than all else here.
            sensitivity = probabilities.addcmul_(probabilities, probabilities, value=-1)
            received += sensitivity.sum(1)
            given.append(sensitivity.sum(2))
        projected = torch.einsum("td,hnd->htn", rows, maps.q_rows.to(rows))
        queries += (projected.mT @ (projected * torch.cat(given, dim=1)[..., None])).cpu().double() / size
        for group, (moment, sensitivities) in enumerate(zip(averaged, received.split(per_group), strict=True)):
            keys[group] += (rows.mT @ (rows * sensitivities.sum(0)[:, None])).cpu().double()
            values[group] += moment.moment()
        tokens += len(x)
    by_head = queries.unflatten(0, (maps.kv_heads, per_head)).sum(1)
    return Moments(keys.div_(tokens), by_head.div_(tokens), values.div_(tokens))


def share_layer(
    layer: HeadMaps, groups: int, position: Rotary | None, moments: Moments
) -> tuple[HeadMaps, dict[str, Shares]]:
    """Convert a layer to `groups` heads by the factorisation under `moments`, and say what each method keeps.

    The shares of `calibrated`, `svd` and `mean` are measured in these weights, in which `calibrated` is the best.
    """
    spans = spans_of(layer.kv_heads, groups)
    energy = moments.queries if position is None else rotated_energy(moments.queries, position)
    felt = output_energy(layer)
    plain = layer_weights(layer, position, None)
    key_rows, value_rows = layer.k_rows, layer.v_rows
    key_kept = _Kept(
        key_rows, energy,
        svd=expand([share_keys(layer, plain, span, position) for span in spans]),
        mean=pooled_rows(key_rows, groups, "mean"),
    )  # fmt: skip
    value_kept = _Kept(
        value_rows, felt,
        svd=expand([share_values(layer, plain, span) for span in spans]),
        mean=pooled_rows(value_rows, groups, "mean"),
    )  # fmt: skip
    keys, values = [], []
    # A group at a time: its damped moments are as large as those that are held for all.
    for span, of_keys, of_values in zip(spans, moments.keys, moments.values, strict=True):
        weights = LayerWeights(energy, felt, damped(_centred(of_keys), DAMPING))
        keys.append(share_keys(layer, weights, span, position))
        key_kept.add(span, keys[-1], weights.second_moment)
        weights = LayerWeights(energy, felt, damped(of_values, DAMPING))
        values.append(share_values(layer, weights, span))
        value_kept.add(span, values[-1], weights.second_moment)
    kept = {name: Shares(key_kept.share(name), value_kept.share(name)) for name in ("calibrated", "svd", "mean")}
    return absorb(layer, keys, values, position), kept


class _Kept:
    """Adds up, group by group, what methods keep of the weighted energy of `rows` (G₀, D, d̃)."""

    def __init__(self, rows: Tensor, weights: Tensor, **seen: Tensor) -> None:
        """Begin with `weights` (G₀, D, D), and the rows that heads see by each method but the calibrated."""
        self._rows, self._weights, self._seen = rows, weights, seen
        self._total, self._lost = 0.0, dict.fromkeys(("calibrated", *seen), 0.0)

    def add(self, span: range, calibrated: SharedRows, moment: Tensor | None) -> None:
        """Add the heads in `span`, which share `calibrated`, under their group's second moment (d̃, d̃)."""
        heads = list(span)
        rows, weights = self._rows[heads], self._weights[heads]
        self._total += weighted_energy(rows, weights, moment)
        seen = {name: found[heads] for name, found in self._seen.items()} | {"calibrated": expand([calibrated])}
        for name, found in seen.items():
            self._lost[name] += weighted_energy(rows - found, weights, moment)

    def share(self, name: str) -> float:
        """Return the share that a method keeps."""
        return 1.0 - self._lost[name] / self._total if self._total > 0 else 1.0


def _centred(moment: Tensor) -> Tensor:
    """Take most of the mean's part out of a moment of x̃ = [x; 1]; its last entry is the total weight."""
    total = moment[-1, -1]
    mean = moment[-1] / total
    return moment - CENTRED * total * torch.outer(mean, mean)
