"""Keys and values as one latent, with the rotary pairs that would cost most in a shared rotary key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.architectures.mla_rope import MLARope
from uptrain.methods.energy import rotated_energy, weighted_energy
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import factor, matrix_root
from uptrain.methods.method import ExplainedEnergy
from uptrain.methods.mla_energy import LatentWeights, key_energy, map_columns, pair_energies, pairs_energy, per_key_head
from uptrain.methods.mla_layer import LatentMaps
from uptrain.methods.rotary import Rotary, apply_factor, to_complex

KEY_WEIGHT = 2.0
"""Weight of a share of key energy relative to a share of value energy, where no text decides."""
LATENT_SHARE = 0.1
"""Weight of a rotary pair's energy, added to its cost where it is not rotated: the rest must still fit the latent."""


@dataclass(frozen=True)
class LatentShape:
    """What a layer becomes.

    - `rope`: where the positions of keys are; a shared rotary key has 2·len(pairs) dims.
    - `rank`: the latent's size.
    - `pairs`: which of the source's rotary pairs each pair of the shared rotary key has.
    - `nope`: whether unrotated key dims exist.
    - `factor`: what the source's rotary tables are multiplied by; unrotated queries carry its square.
    """

    rope: MLARope
    rank: int
    pairs: tuple[int, ...] = ()
    nope: bool = True
    factor: float = 1.0


def factor_latent(
    layer: HeadMaps, shape: LatentShape, position: Rotary | None, weights: LatentWeights, key_weight: float = KEY_WEIGHT
) -> tuple[LatentMaps, ExplainedEnergy]:
    """Convert a layer to a latent of least weighted error of its logits and its output, and measure what it explains.

    The result is exact where the latent is as wide as what it holds and every rotary component has a place in the
    shared rotary key, or needs none.

    - `layer`: the layer's projections by head, float64.
    - `shape`: the sizes of the result.
    - `position`: which key dims are rotated, None where keys see no rotation.
    - `weights`: how much errors count.
    - `key_weight`: weight of a share of key energy relative to a share of value energy.

    Raises:
        ValueError: a shared rotary key is asked for, and the keys see no rotation.

    Source: DeepSeek-AI 2024, DeepSeek-V2, section 2.1 for the form; Meng et al. 2025, TransMLA, section 4 for a
    rotary part in a rotated basis, here per pair, complex and weighted by queries and attention distances.
    """
    problem = _Problem(layer, shape, position, weights)
    keys = problem.keys()
    found = problem.joint(keys, key_weight)
    k_ups = torch.stack(found.k_ups) if found.k_ups else found.down.new_zeros(layer.kv_heads, 0, shape.rank)
    expanded = k_ups, torch.stack(found.v_ups)
    maps = latent_maps(layer, (keys.q_nope, keys.q_rope), (found.down, keys.shared), expanded)
    return maps, problem.explained(keys, found)


def latent_maps(
    layer: HeadMaps, queries: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], expanded: tuple[Tensor, Tensor]
) -> LatentMaps:
    """Return a layer's latent from maps of x̃, with biases where the layer has any.

    - `layer`: the source's layer, whose output projection stays.
    - `queries`: (H, Dn, d̃) and (H, Dr, d̃), for the latent's keys and for the shared rotary key.
    - `cached`: (r, d̃) and (Dr, d̃), the latent and the shared rotary key.
    - `expanded`: (n, Dn, r) and (n, Dv, r), what expands the latent to keys and values.
    """
    q_nope, q_rope, down, k_rope = *queries, *cached
    biased = map_columns(layer) == slice(None)

    def bias(rows: Tensor) -> Tensor | None:
        return rows[..., -1] if biased else None

    return LatentMaps(
        q_nope=q_nope[..., :-1],
        q_rope=q_rope[..., :-1],
        down=down[..., :-1],
        k_rope=k_rope[..., :-1],
        k_up=expanded[0],
        v_up=expanded[1],
        o=layer.o,
        q_nope_bias=bias(q_nope),
        q_rope_bias=bias(q_rope),
        down_bias=bias(down),
        k_rope_bias=bias(k_rope),
    )


@dataclass(frozen=True)
class _Keys:
    """A layer's keys and queries, apart by what the latent does with them.

    - `shared`: (Dr, d̃), the shared rotary key.
    - `q_rope`: (H, Dr, d̃), the queries for it.
    - `q_nope`: (H, Dn, d̃), the queries for the latent's keys.
    - `rest`: (G, Dn, d̃), what the latent must hold of each key.
    - `energy`: (G, Dn, Dn), how much its errors count.
    """

    shared: Tensor
    q_rope: Tensor
    q_nope: Tensor
    rest: Tensor
    energy: Tensor


@dataclass(frozen=True)
class _Joint:
    """The latent's map `down` (r, d̃), and the factors that expand it to each key and each value head."""

    down: Tensor
    k_ups: list[Tensor]
    v_ups: list[Tensor]


@dataclass(frozen=True)
class _Problem:
    """One layer to convert: its projections, what it becomes, its rotation and how much errors count."""

    layer: HeadMaps
    shape: LatentShape
    position: Rotary | None
    weights: LatentWeights

    def keys(self) -> _Keys:
        """Return the keys and queries apart."""
        layer, shape, position = self.layer, self.shape, self.position
        if shape.rope.shares_key:
            keys = self._decoupled()
        else:
            energy = per_key_head(layer, self.weights.queries)
            if shape.rope.rotates_expanded and position is not None:
                # Rotation mixes a pair's two dims evenly and separates pairs.
                energy = rotated_energy(energy, position)
            keys = _Keys(layer.k_rows[0, :0], layer.q_rows[:, :0], layer.q_rows, layer.k_rows, energy)
        if shape.nope:
            return keys
        return _Keys(keys.shared, keys.q_rope, keys.q_nope[:, :0], keys.rest[:, :0], keys.energy[:, :0, :0])

    def _decoupled(self) -> _Keys:
        """Take the shared rotary key out; the latent's keys are read as if rotated by ρ, the mean."""
        layer, position, weights = self.layer, self.position, self.weights
        if position is None or weights.mean_rotation is None:
            raise ValueError("a shared rotary key needs rotary positions")
        shared, q_rope, rest = split_rotary(layer, self.shape.pairs, position, weights)
        conjugate = weights.mean_rotation.conj()
        eye = torch.eye(layer.q.shape[1], dtype=torch.float64).expand(len(conjugate), -1, -1)
        rotation = apply_factor(eye, position, conjugate)  # (H, D, D), real
        q_nope = apply_factor(layer.q_rows, position, conjugate) * self.shape.factor**2
        energy = per_key_head(layer, rotation @ weights.queries @ rotation.mT)
        return _Keys(shared, q_rope, q_nope, rest, energy)

    def joint(self, keys: _Keys, key_weight: float) -> _Joint:
        """Factor what remains of the keys and all values into one latent."""
        layer, weights, rank = self.layer, self.weights, self.shape.rank
        sigma = weights.second_moment
        # Against all key energy, not what the rotary key left of it: a rest of nothing must weigh nothing.
        total_keys = max(key_energy(layer, self.position, weights), 1e-30)
        total_values = max(weighted_energy(layer.v_rows, weights.outputs, sigma), 1e-30)
        blocks, roots = [], []
        for rows, energies, scale in (
            (keys.rest, keys.energy, key_weight / total_keys),
            (layer.v_rows, weights.outputs, 1 / total_values),
        ):
            for row, energy in zip(rows, energies, strict=True):
                if row.shape[0]:
                    blocks.append(row)
                    roots.append(matrix_root(energy) * scale**0.5)
        height = sum(block.shape[0] for block in blocks)
        found = factor(blocks, roots, sigma, min(rank, height))
        missing = rank - found.down.shape[0]
        down = torch.nn.functional.pad(found.down, (0, 0, 0, missing))
        ups = [torch.nn.functional.pad(up, (0, missing)) for up in found.ups]
        count = len(ups) - layer.kv_heads
        return _Joint(down, ups[:count], ups[count:])

    def explained(self, keys: _Keys, found: _Joint) -> ExplainedEnergy:
        """Return the share of the layer's key and value energy that the latent and the shared rotary key explain."""
        layer, position, weights = self.layer, self.position, self.weights
        sigma = weights.second_moment
        values = torch.stack([up @ found.down for up in found.v_ups])
        total_values = weighted_energy(layer.v_rows, weights.outputs, sigma)
        lost_values = weighted_energy(layer.v_rows - values, weights.outputs, sigma)
        lost_keys = 0.0
        if found.k_ups:
            lost = keys.rest - torch.stack([up @ found.down for up in found.k_ups])
            lost_keys = weighted_energy(lost, keys.energy, sigma)
        if self.shape.rope.shares_key and position is not None and self.shape.nope:
            cost, _ = pair_energies(layer, position, weights)
            lost_keys += pairs_energy(to_complex(keys.rest, position), cost, sigma)
        total_keys = key_energy(layer, position, weights)
        return ExplainedEnergy(_share(lost_keys, total_keys), _share(lost_values, total_values))


def split_rotary(
    layer: HeadMaps, chosen: tuple[int, ...], position: Rotary, weights: LatentWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shared rotary key (Dr, d̃), the queries for it (H, Dr, d̃), and what remains of each key (G, D, d̃)."""
    cost, energy = pair_energies(layer, position, weights)
    lost = cost + LATENT_SHARE * energy
    keys, queries = to_complex(layer.k_rows, position), to_complex(layer.q_rows, position)
    left = keys.clone()
    width = layer.k_rows.shape[-1]
    shared = torch.zeros(2 * len(chosen), width, dtype=torch.float64)
    asked = torch.zeros(layer.query_heads, 2 * len(chosen), width, dtype=torch.float64)
    for pair in sorted(set(chosen)):
        places = [place for place, source in enumerate(chosen) if source == pair]
        roots = [matrix_root(lost[g, pair].reshape(1, 1)) for g in range(layer.kv_heads)]
        rank = min(len(places), layer.kv_heads)
        found = factor([keys[g, pair : pair + 1] for g in range(layer.kv_heads)], roots, weights.second_moment, rank)
        for component, place in enumerate(places[:rank]):
            shared[2 * place], shared[2 * place + 1] = found.down[component].real, found.down[component].imag
            for head in range(layer.query_heads):
                group = head // layer.queries_per_kv
                rotated = found.ups[group][0, component].conj() * queries[head, pair]
                asked[head, 2 * place], asked[head, 2 * place + 1] = rotated.real, rotated.imag
        for g in range(layer.kv_heads):
            left[g, pair] -= (found.ups[g] @ found.down)[0]
    rest = layer.k_rows.clone()
    real, imaginary = position.indices()
    rest[:, real], rest[:, imaginary] = left.real, left.imag
    return shared, asked, rest


def _share(lost: float, total: float) -> float:
    return 1.0 - lost / total if total > 0 else 1.0
