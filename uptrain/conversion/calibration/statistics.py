"""The second moment of what attention averages, in the order of products that costs least."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.conversion.calibration.layer_runner import Layer, Parameters
from uptrain.methods.energy import LayerWeights, layer_weights, output_energy, rotated_energy, weighted_energy
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import damped
from uptrain.methods.method import ExplainedEnergy
from uptrain.methods.mla_energy import LatentWeights, calibrated_weights
from uptrain.methods.rotary import Rotary
from uptrain.methods.shared_heads import (
    DAMPING,
    SharedRows,
    absorb,
    expand,
    pooled_rows,
    share_keys,
    share_values,
    spans_of,
)


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
) -> tuple[HeadMaps, dict[str, ExplainedEnergy]]:
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
    kept = {
        name: ExplainedEnergy(key_kept.share(name), value_kept.share(name)) for name in ("calibrated", "svd", "mean")
    }
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


@torch.no_grad()
def latent_weights(layer: Layer, maps: HeadMaps, hidden: Iterable[Tensor], frequencies: Tensor | None) -> LatentWeights:
    """Gather a layer's weights over blocks of hidden states (T, d), each run through the source's attention.

    One second moment must serve keys and values. It is the mean of two of unit trace: inputs as keys are felt, by the
    sensitivity p(1 − p) they receive, and inputs as attention averages them into values. `frequencies` (pairs,) are
    the keys' rotation in radians a token, None without; distances count by the same sensitivity.
    Source: the derivative of softmax, ∂p_s/∂z_s = p_s (1 − p_s).
    """
    size, width = maps.q.shape[1], maps.q.shape[2] + 1
    as_keys = torch.zeros(width, width, dtype=torch.float64)
    as_values = torch.zeros_like(as_keys)
    queries = torch.zeros(maps.query_heads, size, size, dtype=torch.float64)
    distances: Tensor | None = None
    for block in hidden:
        x, parts = layer.attention_weights(block)
        rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        averaged = AveragedMoment(rows, maps.query_heads)
        received, given = rows.new_zeros(len(rows)), list[Tensor]()
        spread = torch.zeros(maps.query_heads, len(rows), dtype=torch.float64)
        for probabilities in parts:
            averaged.add(probabilities)
            # In their place: nothing else needs them any more, and they may be larger than all else here.
            sensitivity = probabilities.addcmul_(probabilities, probabilities, value=-1)
            spread += by_distance(sensitivity, sum(part.shape[1] for part in given)).cpu().double()
            received += sensitivity.sum((0, 1))
            given.append(sensitivity.sum(2))
        projected = torch.einsum("td,hnd->htn", rows, maps.q_rows.to(rows))
        queries += (projected.mT @ (projected * torch.cat(given, dim=1)[..., None])).cpu().double() / size
        as_keys += (rows.mT @ (rows * received[:, None])).cpu().double()
        as_values += averaged.moment()
        distances = spread if distances is None else distances + spread
    if distances is None:
        raise ValueError("no blocks to gather weights on")
    moment = as_keys / as_keys.trace() + as_values / as_values.trace()
    return calibrated_weights(maps, queries, moment, distances, frequencies)


def by_distance(weights: Tensor, start: int = 0) -> Tensor:
    """Sum causal weights (H, R, T) of R queries from the one at `start`: entry Δ of (H, T) is Σ_t w[t, t − Δ]."""
    heads, queries, tokens = weights.shape
    rows = torch.arange(start, start + queries, device=weights.device)
    # Distance Δ of row t is column t − Δ. Gathered, not scattered: accelerators add what is scattered in any order.
    column = rows[:, None] - torch.arange(tokens, device=weights.device)[None]
    turned = weights.gather(2, column.clamp(min=0)[None].expand(heads, -1, -1))
    return turned.masked_fill_(column < 0, 0).sum(1)
