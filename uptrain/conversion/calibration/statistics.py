"""The statistics of a layer on calibration text: second moments of its inputs, and how far back attention looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from uptrain.conversion.calibration.layer_runner import Layer, NumberedBlocks, Parameters
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.mla_energy import LatentWeights, calibrated_weights


class AveragedMoment:
    """Gathers Σ_h Σ_t x̄ x̄ᵀ of x̄ = Σ_s p_h[t, s] x̃_s over `heads` heads, some queries t at a time."""

    def __init__(self, rows: Tensor, heads: int) -> None:
        """Begin for one block's inputs x̃ (T, d̃), float32."""
        tokens, width = rows.shape
        self._rows = rows
        # Xᵀ (Σ_h P_hᵀ P_h) X: wide models have more columns than a block has tokens. On average a query sees half the
        # tokens before the end of its part, and the square of that is a third.
        by_tokens = tokens * (heads * tokens / 3 + width) + width**2
        self._by_tokens = by_tokens < heads * width * (tokens / 2 + width)
        size = tokens if self._by_tokens else width
        self._sum = rows.new_zeros(size, size) if self._by_tokens else torch.zeros(size, size, dtype=torch.float64)

    def add(self, probabilities: Tensor) -> None:
        """Take in the probabilities (H, R, S) of R queries for the first S tokens, float32."""
        seen = probabilities.shape[-1]
        if self._by_tokens:
            flat = probabilities.flatten(0, 1)
            self._sum[:seen, :seen].addmm_(flat.mT, flat)
        else:
            mixed = (probabilities @ self._rows[:seen]).flatten(0, 1)
            self._sum += (mixed.mT @ mixed).cpu().double()

    def moment(self) -> Tensor:
        """Return what was gathered, (d̃, d̃) float64 on the CPU."""
        if self._by_tokens:
            return (self._rows.mT @ (self._sum @ self._rows)).cpu().double()
        return self._sum


@dataclass(frozen=True)
class Moments:
    """What calibration text says of a layer, float64. x̃ = [x; 1], d̃ = d + 1, G groups, G₀ key/value heads.

    - `keys`: (G, d̃, d̃), Σ_t r_t x̃_t x̃_tᵀ, with r the sensitivity p(1 − p) that key t receives from the group's queries.
    - `queries`: (G₀, D, D), Σ_t s_t q_t q_tᵀ / D, with s the same sensitivity summed over keys.
    - `values`: (G, d̃, d̃), Σ_t x̄_t x̄_tᵀ of the inputs as attention averages them.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor


@torch.no_grad()
def gather_moments(
    layer: Layer, maps: HeadMaps, parameters: Parameters, groups: int, hidden: NumberedBlocks
) -> Moments:
    """Gather a layer's moments over blocks of hidden states, each run through the source's attention.

    - `layer`: the source's layer.
    - `maps`: its heads, the heads of each group next to each other.
    - `parameters`: the same heads as the parameters of the layer's attention.
    - `groups`: how many groups the heads form.
    - `hidden`: blocks (T, d), float32, each after its number.

    Source: a key error δ moves logit (t, s) by q_tᵀδ_s, and ∂p_s/∂z_s = p_s (1 − p_s).
    """
    found = _GroupStatistics(maps, groups)
    queries, tokens = _gather(layer, maps, hidden, found.block, parameters)
    by_head = queries.unflatten(0, (maps.kv_heads, maps.queries_per_kv)).sum(1)
    return Moments(found.keys.div_(tokens), by_head.div_(tokens), found.values.div_(tokens))


@torch.no_grad()
def latent_weights(
    layer: Layer, maps: HeadMaps, hidden: NumberedBlocks, inverse_frequencies: Tensor | None
) -> LatentWeights:
    """Gather the weights of a layer's errors over blocks of hidden states, each run through the source's attention.

    One second moment must serve keys and values. It is the mean of two of unit trace: inputs weighted by the
    sensitivity p(1 − p) that they receive as keys, and inputs as attention averages them into values. Distances count
    by the same sensitivity.

    - `layer`: the source's layer.
    - `maps`: its heads.
    - `hidden`: blocks (T, d), float32, each after its number.
    - `inverse_frequencies`: (pairs,), radians per token; None where keys see no rotation.

    Raises:
        ValueError: there is no block.

    Source: the derivative of softmax, ∂p_s/∂z_s = p_s (1 − p_s).
    """
    found = _LatentStatistics(maps)
    queries, _ = _gather(layer, maps, hidden, found.block)
    if found.distances is None:
        raise ValueError("no blocks to gather weights on")
    moment = found.keys / found.keys.trace() + found.values / found.values.trace()
    return calibrated_weights(maps, queries, moment, found.distances, inverse_frequencies)


class _Block(Protocol):
    """Gathers the statistics of one block, some queries at a time."""

    def average(self, probabilities: Tensor) -> None:
        """Take in probabilities (H, R, S) of R queries for the first S tokens."""

    def receive(self, sensitivity: Tensor, start: int) -> None:
        """Take in the sensitivity p(1 − p), (H, R, S), of R queries from the one at `start`."""

    def finish(self) -> None:
        """Add the block to those before it."""


def _gather(
    layer: Layer,
    maps: HeadMaps,
    hidden: NumberedBlocks,
    block_of: Callable[[Tensor], _Block],
    parameters: Parameters | None = None,
) -> tuple[Tensor, int]:
    """Run blocks through a layer's attention; return Σ_t s_t q_t q_tᵀ / D (H, D, D) and the number of tokens.

    - `layer`: the source's layer.
    - `maps`: its heads.
    - `hidden`: blocks (T, d), float32, each after its number.
    - `block_of`: begins the statistics of a block, from its inputs x̃ (T, d̃).
    - `parameters`: what the layer's attention runs with, None for its own.
    """
    size = maps.q.shape[1]
    queries = torch.zeros(maps.query_heads, size, size, dtype=torch.float64)
    tokens = 0
    for number, states in hidden:
        x, parts = layer.on(number).attention_weights(states, parameters)
        rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        block, start, given = block_of(rows), 0, list[Tensor]()
        for probabilities in parts:
            block.average(probabilities)
            # In their place: nothing else needs them any more, and they may be larger than all else here.
            sensitivity = probabilities.addcmul_(probabilities, probabilities, value=-1)
            block.receive(sensitivity, start)
            given.append(sensitivity.sum(2))
            start += sensitivity.shape[1]
        projected = torch.einsum("td,hnd->htn", rows, maps.q_rows.to(rows))
        queries += (projected.mT @ (projected * torch.cat(given, dim=1)[..., None])).cpu().double() / size
        block.finish()
        tokens += len(x)
    return queries, tokens


class _GroupStatistics:
    """Sums the moments of inputs as keys and as values, (G, d̃, d̃) float64 each, of G groups of heads."""

    def __init__(self, maps: HeadMaps, groups: int) -> None:
        width = maps.q.shape[2] + 1
        self.heads, self.groups = maps.query_heads, groups
        self.keys = torch.zeros(groups, width, width, dtype=torch.float64)
        self.values = torch.zeros_like(self.keys)

    def block(self, rows: Tensor) -> _GroupBlock:
        """Begin a block of inputs x̃ (T, d̃)."""
        return _GroupBlock(self, rows)


class _GroupBlock:
    def __init__(self, sums: _GroupStatistics, rows: Tensor) -> None:
        self._sums, self._rows, self._per_group = sums, rows, sums.heads // sums.groups
        self._averaged = [AveragedMoment(rows, self._per_group) for _ in range(sums.groups)]
        self._received = rows.new_zeros(sums.heads, len(rows))

    def average(self, probabilities: Tensor) -> None:
        for moment, heads in zip(self._averaged, probabilities.split(self._per_group), strict=True):
            moment.add(heads)

    def receive(self, sensitivity: Tensor, start: int) -> None:
        self._received[:, : sensitivity.shape[-1]] += sensitivity.sum(1)

    def finish(self) -> None:
        rows, received = self._rows, self._received.split(self._per_group)
        for group, (moment, sensitivity) in enumerate(zip(self._averaged, received, strict=True)):
            self._sums.keys[group] += (rows.mT @ (rows * sensitivity.sum(0)[:, None])).cpu().double()
            self._sums.values[group] += moment.moment()


class _LatentStatistics:
    """Sums the moments of inputs as keys and as values, (d̃, d̃), and the distances (H, T) of attention; float64."""

    def __init__(self, maps: HeadMaps) -> None:
        width = maps.q.shape[2] + 1
        self.heads = maps.query_heads
        self.keys = torch.zeros(width, width, dtype=torch.float64)
        self.values = torch.zeros_like(self.keys)
        self.distances: Tensor | None = None

    def block(self, rows: Tensor) -> _LatentBlock:
        """Begin a block of inputs x̃ (T, d̃)."""
        return _LatentBlock(self, rows)


class _LatentBlock:
    def __init__(self, sums: _LatentStatistics, rows: Tensor) -> None:
        self._sums, self._rows = sums, rows
        self._averaged = AveragedMoment(rows, sums.heads)
        self._received = rows.new_zeros(len(rows))
        self._distances = torch.zeros(sums.heads, len(rows), dtype=torch.float64)

    def average(self, probabilities: Tensor) -> None:
        self._averaged.add(probabilities)

    def receive(self, sensitivity: Tensor, start: int) -> None:
        seen = sensitivity.shape[-1]
        self._distances[:, :seen] += by_distance(sensitivity, start).cpu().double()
        self._received[:seen] += sensitivity.sum((0, 1))

    def finish(self) -> None:
        sums, rows = self._sums, self._rows
        sums.keys += (rows.mT @ (rows * self._received[:, None])).cpu().double()
        sums.values += self._averaged.moment()
        sums.distances = self._distances if sums.distances is None else sums.distances + self._distances


def by_distance(weights: Tensor, start: int = 0) -> Tensor:
    """Sum causal weights (H, R, S) of R queries from the one at `start`: entry Δ of (H, S) is Σ_t w[t, t − Δ]."""
    heads, queries, tokens = weights.shape
    rows = torch.arange(start, start + queries, device=weights.device)
    # Distance Δ of row t is column t − Δ. Gathered, not scattered: accelerators add what is scattered in any order.
    column = rows[:, None] - torch.arange(tokens, device=weights.device)[None]
    by_row = weights.gather(2, column.clamp(min=0)[None].expand(heads, -1, -1))
    return by_row.masked_fill_(column < 0, 0).sum(1)
