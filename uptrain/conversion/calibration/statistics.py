"""The statistics of a layer on calibration text: second moments of its inputs, and how far back attention looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from uptrain.conversion.calibration.layer_runner import Layer, NumberedBlocks, Parameters
from uptrain.methods.energy import output_energy_by_query
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.joint_keys import KeyMoments
from uptrain.methods.joint_values import ValueMoments
from uptrain.methods.mla_energy import LatentMoments
from uptrain.methods.shared_heads import DAMPING

VALUE_SQUARES = 4
"""The most room that moments of averaged values take, in squares of the layer's input."""


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
class GroupMoments:
    """What calibration text says of one group of heads, float64.

    - `keys`: of its queries and keys, by the sensitivity p(1 − p) of each logit.
    - `values`: of its values as attention averages them.
    - `distances`: (n, T), the sensitivity of each query head's logits by their distance.
    """

    keys: KeyMoments
    values: ValueMoments
    distances: Tensor


@torch.no_grad()
def gather_moments(
    layer: Layer, maps: HeadMaps, parameters: Parameters, groups: int, hidden: NumberedBlocks
) -> list[GroupMoments]:
    """Gather the moments of each group over blocks of hidden states, each run through the source's attention.

    - `layer`: the source's layer.
    - `maps`: its heads, the heads of each group next to each other.
    - `parameters`: the same heads as the parameters of the layer's attention.
    - `groups`: how many groups the heads form.
    - `hidden`: blocks (T, d), float32, each after its number.

    Raises:
        ValueError: there is no block.

    Source: a key error δ moves logit (t, s) by q_tᵀδ_s, and ∂p_s/∂z_s = p_s (1 − p_s).
    """
    found = _GroupStatistics(maps, groups)
    gathered = _gather(layer, maps, hidden, found.block, parameters)
    return found.moments(gathered.queries / gathered.tokens, gathered.distances)


@torch.no_grad()
def latent_moments(
    layer: Layer, maps: HeadMaps, hidden: NumberedBlocks, inverse_frequencies: Tensor | None
) -> LatentMoments:
    """Gather what a latent of a layer is fitted to, over blocks of hidden states, each run through its attention.

    Inputs count as keys by the sensitivity p(1 − p) that they receive, and as values as attention averages them.
    Distances count by the same sensitivity.

    - `layer`: the source's layer.
    - `maps`: its heads.
    - `hidden`: blocks (T, d), float32, each after its number.
    - `inverse_frequencies`: (pairs,), radians per token; None where keys see no rotation.

    Raises:
        ValueError: there is no block.

    Source: the derivative of softmax, ∂p_s/∂z_s = p_s (1 − p_s).
    """
    found = _LatentStatistics(maps)
    gathered = _gather(layer, maps, hidden, found.block)
    return LatentMoments(
        queries=gathered.queries,
        keys=found.keys,
        values=found.values,
        distances=gathered.distances,
        inverse_frequencies=inverse_frequencies,
    )


class _Block(Protocol):
    """Gathers the statistics of one block, some queries at a time."""

    def average(self, probabilities: Tensor) -> None:
        """Take in probabilities (H, R, S) of R queries for the first S tokens."""

    def receive(self, sensitivity: Tensor) -> None:
        """Take in the sensitivity p(1 − p), (H, R, S), of R queries for the first S tokens."""

    def finish(self) -> None:
        """Add the block to those before it."""


@dataclass(frozen=True)
class _QueryStatistics:
    """What blocks say of a layer's queries, whatever else is gathered of them, float64.

    - `queries`: (H, D, D), Σ_t s_t q_t q_tᵀ / D, s_t the sensitivity that query t gives.
    - `distances`: (H, T), the sensitivity of each query head's logits by their distance.
    - `tokens`: the number of tokens.
    """

    queries: Tensor
    distances: Tensor
    tokens: int


def _gather(
    layer: Layer,
    maps: HeadMaps,
    hidden: NumberedBlocks,
    block_of: Callable[[Tensor], _Block],
    parameters: Parameters | None = None,
) -> _QueryStatistics:
    """Run blocks through a layer's attention.

    - `layer`: the source's layer.
    - `maps`: its heads.
    - `hidden`: blocks (T, d), float32, each after its number.
    - `block_of`: begins the statistics of a block, from its inputs x̃ (T, d̃).
    - `parameters`: what the layer's attention runs with, None for its own.

    Raises:
        ValueError: there is no block.
    """
    size = maps.q.shape[1]
    queries = torch.zeros(maps.query_heads, size, size, dtype=torch.float64)
    distances: Tensor | None = None
    tokens = 0
    for number, states in hidden:
        x, parts = layer.on(number).attention_weights(states, parameters)
        rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        block, start, given = block_of(rows), 0, list[Tensor]()
        spanned = torch.zeros(maps.query_heads, len(rows), dtype=torch.float64)
        for probabilities in parts:
            block.average(probabilities)
            # In their place: nothing else needs them any more, and they may be larger than all else here.
            sensitivity = probabilities.addcmul_(probabilities, probabilities, value=-1)
            block.receive(sensitivity)
            spanned[:, : sensitivity.shape[-1]] += by_distance(sensitivity, start).cpu().double()
            given.append(sensitivity.sum(2))
            start += sensitivity.shape[1]
        projected = torch.einsum("td,hnd->htn", rows, maps.q_rows.to(rows))
        queries += (projected.mT @ (projected * torch.cat(given, dim=1)[..., None])).cpu().double() / size
        block.finish()
        distances = spanned if distances is None else distances + spanned
        tokens += len(x)
    if distances is None:
        raise ValueError("no blocks to gather moments on")
    return _QueryStatistics(queries, distances, tokens)


class _GroupStatistics:
    """Sums each group's stacked keys and averaged values; float64, but for the stacks of one block."""

    def __init__(self, maps: HeadMaps, groups: int) -> None:
        self.maps, self.groups = maps, groups
        self.heads, self.stacked = maps.query_heads // groups, maps.kv_heads // groups
        self.shared = value_moments(maps, groups)
        keys, values = self.stacked * maps.k.shape[1], self.stacked * maps.v.shape[1]
        self.keys = torch.zeros(groups, keys, keys, dtype=torch.float64)
        self.sums = torch.zeros(groups, keys, dtype=torch.float64)
        self.values = torch.zeros(groups, self.shared, values, values, dtype=torch.float64)

    def block(self, rows: Tensor) -> _GroupBlock:
        """Begin a block of inputs x̃ (T, d̃)."""
        return _GroupBlock(self, rows)

    def moments(self, queries: Tensor, distances: Tensor) -> list[GroupMoments]:
        """Return each group's moments, with those of its queries (H, D, D) and its share of distances (H, T)."""
        maps = self.maps
        places = tuple(head // maps.queries_per_kv for head in range(self.heads))
        by_group = (each.split(self.heads) for each in (queries, output_energy_by_query(maps), distances))
        found = []
        for group, (asked, read, spanned) in enumerate(zip(*by_group, strict=True)):
            total = float(spanned.sum()) or 1.0
            rows = slice(group * self.stacked, (group + 1) * self.stacked)
            keys, values = maps.k_rows[rows].flatten(0, 1), maps.v_rows[rows].flatten(0, 1)
            found.append(GroupMoments(
                KeyMoments(asked, _damped(self.keys[group] / total, keys), self.sums[group] / total, places),
                ValueMoments(read, _damped(self.values[group], values), places),
                spanned,
            ))  # fmt: skip
        return found


class _GroupBlock:
    def __init__(self, sums: _GroupStatistics, rows: Tensor) -> None:
        maps, self._sums = sums.maps, sums
        self._keys, self._values = (_stacks(rows, each, sums.groups) for each in (maps.k_rows, maps.v_rows))
        self._per = sums.heads // sums.shared
        self._averaged = [AveragedMoment(each, self._per) for each in self._values for _ in range(sums.shared)]
        self._received = rows.new_zeros(maps.query_heads, len(rows))

    def average(self, probabilities: Tensor) -> None:
        for moment, heads in zip(self._averaged, probabilities.split(self._per), strict=True):
            moment.add(heads)

    def receive(self, sensitivity: Tensor) -> None:
        self._received[:, : sensitivity.shape[-1]] += sensitivity.sum(1)

    def finish(self) -> None:
        sums, received = self._sums, self._received.unflatten(0, (self._sums.groups, -1)).sum(1)
        for group, (stack, weights) in enumerate(zip(self._keys, received.cpu().double(), strict=True)):
            # In float64: heads that are alike leave a moment singular, and rounding would make it indefinite.
            keys = stack.cpu().double()
            sums.keys[group] += keys.mT @ (keys * weights[:, None])
            sums.sums[group] += weights @ keys
        for place, moment in enumerate(self._averaged):
            sums.values[place // sums.shared, place % sums.shared] += moment.moment()


def value_moments(maps: HeadMaps, groups: int) -> int:
    """Return how many moments of averaged values each group has: one for each query head where they are small.

    Those of all groups are no larger than `VALUE_SQUARES` squares as wide as the layer's input, but one for each group.
    """
    heads, width = maps.query_heads // groups, maps.kv_heads // groups * maps.v.shape[1]
    room = VALUE_SQUARES * maps.q.shape[2] ** 2 // (groups * width**2)
    return max(count for count in range(1, heads + 1) if heads % count == 0 and count <= max(1, room))


def _stacks(rows: Tensor, heads: Tensor, groups: int) -> list[Tensor]:
    """Return each group's stacked heads (T, N) of inputs x̃ (T, d̃), from the heads' maps (G₀, D, d̃)."""
    return [rows @ group.flatten(0, 1).to(rows).mT for group in heads.unflatten(0, (groups, -1))]


def _damped(moments: Tensor, rows: Tensor) -> Tensor:
    """Return moments (…, N, N) of heads with maps `rows` (N, d̃) as if their inputs had a little of white noise."""
    energy, noise = moments.diagonal(dim1=-2, dim2=-1).sum(-1), rows @ rows.mT
    level = DAMPING * energy / noise.trace().clamp(min=torch.finfo(torch.float64).tiny)
    return moments + level[..., None, None] * noise


class _LatentStatistics:
    """Sums the moments of inputs as keys and as values, (d̃, d̃) float64."""

    def __init__(self, maps: HeadMaps) -> None:
        width = maps.q.shape[2] + 1
        self.heads = maps.query_heads
        self.keys = torch.zeros(width, width, dtype=torch.float64)
        self.values = torch.zeros_like(self.keys)

    def block(self, rows: Tensor) -> _LatentBlock:
        """Begin a block of inputs x̃ (T, d̃)."""
        return _LatentBlock(self, rows)


class _LatentBlock:
    def __init__(self, sums: _LatentStatistics, rows: Tensor) -> None:
        self._sums, self._rows = sums, rows
        self._averaged = AveragedMoment(rows, sums.heads)
        self._received = rows.new_zeros(len(rows))

    def average(self, probabilities: Tensor) -> None:
        self._averaged.add(probabilities)

    def receive(self, sensitivity: Tensor) -> None:
        self._received[: sensitivity.shape[-1]] += sensitivity.sum((0, 1))

    def finish(self) -> None:
        sums, rows = self._sums, self._rows
        sums.keys += (rows.mT @ (rows * self._received[:, None])).cpu().double()
        sums.values += self._averaged.moment()


def by_distance(weights: Tensor, start: int = 0) -> Tensor:
    """Sum causal weights (H, R, S) of R queries from the one at `start`: entry Δ of (H, S) is Σ_t w[t, t − Δ]."""
    heads, queries, tokens = weights.shape
    rows = torch.arange(start, start + queries, device=weights.device)
    # Distance Δ of row t is column t − Δ. Gathered, not scattered: accelerators add what is scattered in any order.
    column = rows[:, None] - torch.arange(tokens, device=weights.device)[None]
    by_row = weights.gather(2, column.clamp(min=0)[None].expand(heads, -1, -1))
    return by_row.masked_fill_(column < 0, 0).sum(1)
