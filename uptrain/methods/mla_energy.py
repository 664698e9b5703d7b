"""How much the errors of a latent layer count, and what each rotary pair costs where it is not rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.methods.energy import output_energy, rotated_energy, weighted_energy
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import damped, gram
from uptrain.methods.rotary import Rotary, to_complex
from uptrain.methods.shared_heads import DAMPING

PRIOR_TOKENS = 1024
"""Distances over which attention is assumed to fall off as 1/(1 + distance) where none were measured."""


@dataclass(frozen=True)
class LatentWeights:
    """How much a layer's errors count. H query heads, G key/value heads, d̃ = d + 1; all float64 or complex128.

    - `queries`: (H, D, D), each query head's second moment.
    - `outputs`: (G, Dv, Dv), Σ W_oᵀ W_o over the query heads that read each value head.
    - `second_moment`: (d̃, d̃), E[x̃x̃ᵀ] of the layer's input, None for the identity.
    - `mean_rotation`: (H, pairs) complex, ρ = E[e^{−iθΔ}]: what remains of a pair on average where it is not rotated.
      None where keys see no rotation.
    """

    queries: Tensor
    outputs: Tensor
    second_moment: Tensor | None
    mean_rotation: Tensor | None

    @property
    def rotation(self) -> Tensor:
        """Return ρ (H, pairs).

        Raises:
            ValueError: keys see no rotation.
        """
        if self.mean_rotation is None:
            raise ValueError("keys without a rotation have no rotary pairs")
        return self.mean_rotation


@dataclass(frozen=True, kw_only=True)
class LatentMoments:
    """What calibration text says of a layer's inputs x̃ = [x; 1] and distances, float64. d̃ = d + 1, H query heads.

    - `queries`: (H, D, D), each query head's second moment.
    - `keys`: (d̃, d̃), E[x̃x̃ᵀ] weighted by the sensitivity that inputs receive as keys, of any total weight.
    - `values`: (d̃, d̃), E[x̃x̃ᵀ] of inputs as attention averages them into values, of any total weight.
    - `distances`: (H, T), how much attention looks back by each distance.
    - `inverse_frequencies`: (pairs,), radians per token; None where keys see no rotation.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    distances: Tensor
    inverse_frequencies: Tensor | None

    def weights(self, layer: HeadMaps) -> LatentWeights:
        """Return the weights of the errors of `layer` under one moment: the mean of the two at unit trace."""
        rotation = None
        if self.inverse_frequencies is not None:
            rotation = mean_rotation(self.inverse_frequencies, self.distances)
        moment = self.keys / self.keys.trace() + self.values / self.values.trace()
        return LatentWeights(self.queries, output_energy(layer), damped(moment, DAMPING), rotation)

    def of_keys(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the keys' moment and mean, of a total weight of 1, in some `columns` of x̃."""
        moment = self.keys / self.keys[-1, -1]
        return moment[columns, columns], moment[-1, columns]


def map_columns(layer: HeadMaps) -> slice:
    """Return the columns of x̃ that the layer's maps have: without biases, not the last."""
    biased = any(bias is not None for bias in (layer.q_bias, layer.k_bias, layer.v_bias))
    return slice(None) if biased else slice(-1)


def plain_weights(layer: HeadMaps, inverse_frequencies: Tensor | None) -> LatentWeights:
    """Return the weights that need no text: identities, and an assumed fall-off of attention with distance."""
    dims, value_dims = layer.k.shape[1], layer.v.shape[1]
    rotation = None
    if inverse_frequencies is not None:
        distances = torch.arange(PRIOR_TOKENS, dtype=torch.float64)
        rotation = mean_rotation(inverse_frequencies, (1 / (1 + distances)).expand(layer.query_heads, -1))
    return LatentWeights(
        queries=torch.eye(dims, dtype=torch.float64).expand(layer.query_heads, -1, -1) / layer.queries_per_kv,
        outputs=torch.eye(value_dims, dtype=torch.float64).expand(layer.kv_heads, -1, -1),
        second_moment=None,
        mean_rotation=rotation,
    )


def mean_rotation(inverse_frequencies: Tensor, distances: Tensor) -> Tensor:
    """Return ρ = E[e^{−iθΔ}], (H, pairs) complex, for θ (pairs,) in radians per token and weights (H, T) of distances.

    Source: Su et al. 2021, RoFormer, equation 12: a logit depends on a pair's rotation by e^{−iθΔ} alone.
    """
    angles = torch.arange(distances.shape[1], dtype=torch.float64)[:, None] * inverse_frequencies.double()[None]
    share = distances.double() / distances.double().sum(1, keepdim=True).clamp(min=1e-30)
    return torch.complex(share @ angles.cos(), -(share @ angles.sin()))


def rotary_savings(layer: HeadMaps, position: Rotary, weights: LatentWeights) -> Tensor:
    """Return what each component (pairs, G) of each rotary pair costs where it is not rotated, descending along G.

    The unit is the layer's key energy. The sum over the components without a place in the shared rotary key is what
    the layer loses to rotation.
    """
    cost, energy = pair_energies(layer, position, weights)
    pairs = to_complex(layer.k_rows, position)
    found = []
    for pair in range(position.pairs):
        stack = pairs[:, pair] * cost[:, pair].sqrt()[:, None]
        found.append(torch.linalg.eigvalsh(gram(stack, weights.second_moment)).flip(0).clamp(min=0))
    return torch.stack(found) / max(pairs_energy(pairs, energy, weights.second_moment), 1e-30)


def choose_rope_pairs(savings: Sequence[Tensor], places: int) -> tuple[int, ...]:
    """Return which of the source's rotary pairs each of `places` pairs of the shared key has, ascending.

    `savings` are `rotary_savings` (pairs, G) of every layer, and one choice serves all layers. A pair of the source
    gets as many places as its components cost.
    """
    total = torch.stack(list(savings)).sum(0)
    order = total.flatten().argsort(descending=True, stable=True)[:places]
    return tuple(sorted((order // total.shape[1]).tolist()))


def pair_energies(layer: HeadMaps, position: Rotary, weights: LatentWeights) -> tuple[Tensor, Tensor]:
    """Return two weights of each key head's rotary pairs, both (G, pairs).

    The first is what a unit of the pair costs where it is not rotated. The second is what its errors count.
    """
    rotation = weights.rotation
    real, imaginary = position.indices()
    diagonal = weights.queries.diagonal(dim1=-2, dim2=-1)
    energy = (diagonal[:, real] + diagonal[:, imaginary]) / 2
    cost = energy * (1 - rotation.abs().square()).clamp(min=0)
    grouped = (layer.kv_heads, layer.queries_per_kv)
    return cost.unflatten(0, grouped).sum(1), energy.unflatten(0, grouped).sum(1)


def pairs_energy(pairs: Tensor, weights: Tensor, second_moment: Tensor | None) -> float:
    """Return the energy of complex rows (G, pairs, d̃), weighted by (G, pairs), under a second moment (d̃, d̃)."""
    if second_moment is None:
        each = pairs.abs().square().sum(-1)
    else:
        each = ((pairs.real @ second_moment) * pairs.real + (pairs.imag @ second_moment) * pairs.imag).sum(-1)
    return float((weights * each).sum())


def per_key_head(layer: HeadMaps, queries: Tensor) -> Tensor:
    """Sum query moments (H, D, D) over the query heads that read each key head, (G, D, D)."""
    summed: Tensor = queries.unflatten(0, (layer.kv_heads, layer.queries_per_kv)).sum(1)
    return summed


def key_energy(layer: HeadMaps, position: Rotary | None, weights: LatentWeights) -> float:
    """Return the energy of all the source's keys, as its own logits weigh it."""
    by_head = per_key_head(layer, weights.queries)
    if position is not None:
        by_head = rotated_energy(by_head, position)
    return weighted_energy(layer.k_rows, by_head, weights.second_moment)
