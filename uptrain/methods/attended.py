"""The calibrated factorisation: keys and values weighed by the attention they really receive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.methods.averages import averaged_moment
from uptrain.methods.energy import (
    LayerWeights,
    Shares,
    layer_weights,
    output_energy,
    rotated_energy,
    weighted_energy,
)
from uptrain.methods.factor import damped
from uptrain.methods.factored import DAMPING, absorb, expand, pooled_rows, share_keys, share_values, spans_of
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
        x, probabilities = layer.attention_weights(block, parameters)
        rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        sensitivity = probabilities - probabilities.square()
        received, given = sensitivity.sum(1), sensitivity.sum(2)
        projected = torch.einsum("td,hnd->htn", rows, maps.q_rows.to(rows))
        queries += (projected.mT @ (projected * given[..., None])).double().cpu() / size
        for group in range(groups):
            heads = slice(group * per_group, (group + 1) * per_group)
            keys[group] += (rows.mT @ (rows * received[heads].sum(0)[:, None])).double().cpu()
            values[group] += averaged_moment(probabilities[heads], rows)
        tokens += len(x)
    by_head = queries.unflatten(0, (maps.kv_heads, per_head)).sum(1)
    return Moments(keys / tokens, by_head / tokens, values / tokens)


def share_layer(
    layer: HeadMaps, groups: int, position: Rotary | None, moments: Moments
) -> tuple[HeadMaps, dict[str, Shares]]:
    """Convert a layer to `groups` heads by the factorisation under `moments`, and say what each method keeps.

    The shares of `calibrated`, `svd` and `mean` are measured in these weights, in which `calibrated` is the best.
    """
    spans = spans_of(layer.kv_heads, groups)
    energy = moments.queries if position is None else rotated_energy(moments.queries, position)
    felt = output_energy(layer)
    key_weights = [LayerWeights(energy, felt, damped(_centred(moment), DAMPING)) for moment in moments.keys]
    value_weights = [LayerWeights(energy, felt, damped(moment, DAMPING)) for moment in moments.values]
    keys = [share_keys(layer, weights, span, position) for weights, span in zip(key_weights, spans, strict=True)]
    values = [share_values(layer, weights, span) for weights, span in zip(value_weights, spans, strict=True)]
    plain = layer_weights(layer, position, None)
    candidates = {
        "calibrated": (expand(keys), expand(values)),
        "svd": (
            expand([share_keys(layer, plain, span, position) for span in spans]),
            expand([share_values(layer, plain, span) for span in spans]),
        ),
        "mean": (pooled_rows(layer.k_rows, groups, "mean"), pooled_rows(layer.v_rows, groups, "mean")),
    }
    kept = {
        name: Shares(
            _kept(layer.k_rows, k, spans, [(weights.keys, weights.second_moment) for weights in key_weights]),
            _kept(layer.v_rows, v, spans, [(weights.values, weights.second_moment) for weights in value_weights]),
        )
        for name, (k, v) in candidates.items()
    }
    return absorb(layer, keys, values, position), kept


def _centred(moment: Tensor) -> Tensor:
    """Take most of the mean's part out of a moment of x̃ = [x; 1]; its last entry is the total weight."""
    total = moment[-1, -1]
    mean = moment[-1] / total
    return moment - CENTRED * total * torch.outer(mean, mean)


def _kept(rows: Tensor, seen: Tensor, spans: list[range], weights: list[tuple[Tensor, Tensor | None]]) -> float:
    """Return the share of the weighted energy of `rows` (G₀, D, d̃) that `seen` keeps, over all groups."""
    total = lost = 0.0
    for span, (weight, moment) in zip(spans, weights, strict=True):
        heads = list(span)
        total += weighted_energy(rows[heads], weight[heads], moment)
        lost += weighted_energy(rows[heads] - seen[heads], weight[heads], moment)
    return 1.0 - lost / total if total > 0 else 1.0
