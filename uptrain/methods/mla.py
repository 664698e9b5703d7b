"""Keys and values as one latent, with the rotary pairs that would cost most kept apart in a shared rotary key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from uptrain.methods.energy import output_energy, rotated_energy, weighted_energy
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import damped, factor, gram, matrix_root
from uptrain.methods.method import ExplainedEnergy
from uptrain.methods.mla_layer import LatentMaps
from uptrain.methods.rotary import Rotary, apply_factor, to_complex
from uptrain.methods.shared_heads import DAMPING

KEY_WEIGHT = 2.0
"""How many times more a share of key energy counts than one of value energy, where no text decides."""
LATENT_SHARE = 0.1
"""What a rotary pair's energy counts beside the cost of unrotating it: what is left must still fit the latent."""
PRIOR_TOKENS = 1024
"""Distances over which attention is assumed to fall off as 1/(1 + distance) where none were measured."""

Form = Literal["free", "decoupled", "re-rotate"]


@dataclass(frozen=True)
class LatentShape:
    """Say what a layer becomes: a latent of `rank`, and rotary pairs with the source's frequencies `slots`.

    `free` has keys without rotation; `decoupled` a shared rotary key of 2·len(slots) dims beside unrotated ones;
    `re-rotate` a latent whose keys are rotated when they are read. `nope` says whether unrotated key dims exist;
    `factor` is what the source's rotary tables are multiplied by, which unrotated queries then carry squared.
    """

    form: Form
    rank: int
    slots: tuple[int, ...] = ()
    nope: bool = True
    factor: float = 1.0


@dataclass(frozen=True)
class LatentWeights:
    """Hold how a layer's errors count, float64: H query heads, G heads, d̃ = d + 1.

    `queries` (H, D, D) is each head's query moment, `outputs` (G, Dv, Dv) Σ W_oᵀ W_o, `second_moment` (d̃, d̃) or None;
    `kept_turn` (H, pairs) complex is ρ = E[e^{−iθΔ}], what is left of a pair on average when it is not rotated.
    """

    queries: Tensor
    outputs: Tensor
    second_moment: Tensor | None
    kept_turn: Tensor | None


def plain_weights(layer: HeadMaps, frequencies: Tensor | None) -> LatentWeights:
    """Return the weights that need no text: identities, and an assumed fall-off of attention with distance."""
    dims, value_dims = layer.k.shape[1], layer.v.shape[1]
    kept = None
    if frequencies is not None:
        distances = torch.arange(PRIOR_TOKENS, dtype=torch.float64)
        kept = mean_turn(frequencies, (1 / (1 + distances)).expand(layer.query_heads, -1))
    per = layer.queries_per_kv
    return LatentWeights(
        torch.eye(dims, dtype=torch.float64).expand(layer.query_heads, -1, -1) / per,
        torch.eye(value_dims, dtype=torch.float64).expand(layer.kv_heads, -1, -1),
        None,
        kept,
    )


def mean_turn(frequencies: Tensor, distances: Tensor) -> Tensor:
    """Return ρ (H, pairs) complex = E[e^{−iθΔ}] for `frequencies` (pairs,) and weights of `distances` (H, T)."""
    angles = torch.arange(distances.shape[1], dtype=torch.float64)[:, None] * frequencies.double()[None]
    share = distances.double() / distances.double().sum(1, keepdim=True).clamp(min=1e-30)
    return torch.complex(share @ angles.cos(), -(share @ angles.sin()))


def factor_latent(
    layer: HeadMaps, shape: LatentShape, position: Rotary | None, weights: LatentWeights, key_weight: float = KEY_WEIGHT
) -> tuple[LatentMaps, ExplainedEnergy]:
    """Convert a layer to a latent, minimising what its logits and output feel under `weights`; and what is kept.

    Exact when the latent is as wide as what it holds and every rotary component has a slot, or none is needed.
    Source: DeepSeek-AI 2024, DeepSeek-V2, section 2.1 for the form; Meng et al. 2025, TransMLA, section 4 for a
    rotary part in a rotated basis, here per frequency, complex and weighted by queries and attention distances.
    """
    if shape.form == "decoupled":
        if position is None or weights.kept_turn is None:
            raise ValueError("a decoupled rotary key needs rotary positions")
        shared, q_rope, rest = _split_rotary(layer, shape.slots, position, weights)
        turn = _turns(weights.kept_turn, position, layer.q.shape[1])
        q_nope = apply_factor(layer.q_rows, position, weights.kept_turn.conj()) * shape.factor**2
        queries = turn @ weights.queries @ turn.mT
    else:
        shared = layer.k_rows[0, :0]
        q_rope, rest = layer.q_rows[:, :0], layer.k_rows
        q_nope = layer.q_rows
        queries = weights.queries
    by_head = _per_key_head(layer, queries)
    if shape.form == "re-rotate" and position is not None:
        # Rotation mixes a pair's two dims evenly and tells pairs apart.
        by_head = rotated_energy(by_head, position)
    if not shape.nope:
        rest, q_nope, by_head = rest[:, :0], q_nope[:, :0], by_head[:, :0, :0]
    down, k_ups, v_ups = _joint(layer, rest, by_head, weights, position, shape.rank, key_weight)
    kept = _shares(layer, rest, by_head, weights, position, shape, (down, k_ups, v_ups))
    biased = any(bias is not None for bias in (layer.q_bias, layer.k_bias, layer.v_bias))

    def bias(rows: Tensor) -> Tensor | None:
        return rows[..., -1] if biased else None

    maps = LatentMaps(
        q_nope=q_nope[..., :-1],
        q_rope=q_rope[..., :-1],
        down=down[..., :-1],
        k_rope=shared[..., :-1],
        k_up=torch.stack(k_ups) if k_ups else down.new_zeros(layer.kv_heads, 0, shape.rank),
        v_up=torch.stack(v_ups),
        o=layer.o,
        q_nope_bias=bias(q_nope),
        q_rope_bias=bias(q_rope),
        down_bias=bias(down),
        k_rope_bias=bias(shared),
    )
    return maps, kept


def rotary_savings(layer: HeadMaps, position: Rotary, weights: LatentWeights) -> Tensor:
    """Return what each component (pairs, G) of each frequency costs when left unrotated, descending along G.

    As a share of the layer's key energy; the sum over what has no slot is what a layer loses to rotation.
    """
    cost, felt = _pair_energies(layer, position, weights)
    pairs = to_complex(layer.k_rows, position)
    found = []
    for pair in range(position.pairs):
        stack = pairs[:, pair] * cost[:, pair].sqrt()[:, None]
        found.append(torch.linalg.eigvalsh(gram(stack, weights.second_moment)).flip(0).clamp(min=0))
    return torch.stack(found) / max(_pairs_energy(pairs, felt, weights.second_moment), 1e-30)


def choose_slots(savings: Sequence[Tensor], slots: int) -> tuple[int, ...]:
    """Return which source frequency each of `slots` rotary pairs has, one table for all layers.

    `savings` are `rotary_savings` (pairs, G) of every layer; a frequency gets as many slots as its components cost.
    """
    total = torch.stack(list(savings)).sum(0)
    order = total.flatten().argsort(descending=True, stable=True)[:slots]
    return tuple(sorted((order // total.shape[1]).tolist()))


def _pair_energies(layer: HeadMaps, position: Rotary, weights: LatentWeights) -> tuple[Tensor, Tensor]:
    """Return what a unit of each head's pair costs when it isn't rotated, and what it is felt by; both (G, pairs)."""
    if weights.kept_turn is None:
        raise ValueError("rotary pairs need ρ")
    real, imaginary = position.indices()
    diagonal = weights.queries.diagonal(dim1=-2, dim2=-1)
    energy = (diagonal[:, real] + diagonal[:, imaginary]) / 2
    cost = energy * (1 - weights.kept_turn.abs().square()).clamp(min=0)
    grouped = (layer.kv_heads, layer.queries_per_kv)
    return cost.unflatten(0, grouped).sum(1), energy.unflatten(0, grouped).sum(1)


def _pairs_energy(pairs: Tensor, weights: Tensor, second_moment: Tensor | None) -> float:
    """Return the energy of complex rows (G, pairs, d̃), weighted by (G, pairs)."""
    if second_moment is None:
        each = pairs.abs().square().sum(-1)
    else:
        each = ((pairs.real @ second_moment) * pairs.real + (pairs.imag @ second_moment) * pairs.imag).sum(-1)
    return float((weights * each).sum())


def _split_rotary(
    layer: HeadMaps, slots: tuple[int, ...], position: Rotary, weights: LatentWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the shared rotary key (Dr, d̃), the queries for it (H, Dr, d̃), and what is left of each key (G, D, d̃)."""
    cost, felt = _pair_energies(layer, position, weights)
    lost = cost + LATENT_SHARE * felt
    keys, queries = to_complex(layer.k_rows, position), to_complex(layer.q_rows, position)
    left = keys.clone()
    width = layer.k_rows.shape[-1]
    shared = torch.zeros(2 * len(slots), width, dtype=torch.float64)
    asked = torch.zeros(layer.query_heads, 2 * len(slots), width, dtype=torch.float64)
    for pair in sorted(set(slots)):
        places = [place for place, slot in enumerate(slots) if slot == pair]
        roots = [matrix_root(lost[g, pair].reshape(1, 1)) for g in range(layer.kv_heads)]
        rank = min(len(places), layer.kv_heads)
        found = factor([keys[g, pair : pair + 1] for g in range(layer.kv_heads)], roots, weights.second_moment, rank)
        for component, place in enumerate(places[:rank]):
            shared[2 * place], shared[2 * place + 1] = found.down[component].real, found.down[component].imag
            for head in range(layer.query_heads):
                group = head // layer.queries_per_kv
                turned = found.ups[group][0, component].conj() * queries[head, pair]
                asked[head, 2 * place], asked[head, 2 * place + 1] = turned.real, turned.imag
        for g in range(layer.kv_heads):
            left[g, pair] -= (found.ups[g] @ found.down)[0]
    rest = layer.k_rows.clone()
    real, imaginary = position.indices()
    rest[:, real], rest[:, imaginary] = left.real, left.imag
    return shared, asked, rest


def _per_key_head(layer: HeadMaps, queries: Tensor) -> Tensor:
    """Sum query moments (H, D, D) over the queries that read each key head, (G, D, D)."""
    summed: Tensor = queries.unflatten(0, (layer.kv_heads, layer.queries_per_kv)).sum(1)
    return summed


def _turns(kept_turn: Tensor, position: Rotary, dims: int) -> Tensor:
    """Return the real (H, D, D) matrices that multiply each pair of a query by the conjugate of ρ."""
    eye = torch.eye(dims, dtype=torch.float64).expand(len(kept_turn), -1, -1)
    return apply_factor(eye, position, kept_turn.conj())


def _key_energy(layer: HeadMaps, weights: LatentWeights, position: Rotary | None) -> float:
    """Return the energy of all the source's keys, as its own logits feel it."""
    by_head = _per_key_head(layer, weights.queries)
    felt = by_head if position is None else rotated_energy(by_head, position)
    return weighted_energy(layer.k_rows, felt, weights.second_moment)


def _joint(
    layer: HeadMaps,
    keys: Tensor,
    by_head: Tensor,
    weights: LatentWeights,
    position: Rotary | None,
    rank: int,
    key_weight: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Factor what is left of the keys and all values into one latent: (r, d̃), and what expands it again."""
    sigma = weights.second_moment
    # Against all key energy, not what the rotary key left of it: a rest of nothing must weigh nothing.
    total_keys = max(_key_energy(layer, weights, position), 1e-30)
    total_values = max(weighted_energy(layer.v_rows, weights.outputs, sigma), 1e-30)
    blocks, roots = [], []
    for rows, energies, scale in (
        (keys, by_head, key_weight / total_keys),
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
    return down, ups[:count], ups[count:]


def _shares(
    layer: HeadMaps, rest: Tensor, by_head: Tensor, weights: LatentWeights, position: Rotary | None,
    shape: LatentShape, found: tuple[Tensor, list[Tensor], list[Tensor]],
) -> ExplainedEnergy:  # fmt: skip
    down, k_ups, v_ups = found
    sigma = weights.second_moment
    values = torch.stack([up @ down for up in v_ups])
    total_values = weighted_energy(layer.v_rows, weights.outputs, sigma)
    lost_values = weighted_energy(layer.v_rows - values, weights.outputs, sigma)
    lost_keys = weighted_energy(rest - torch.stack([up @ down for up in k_ups]), by_head, sigma) if k_ups else 0.0
    total_keys = _key_energy(layer, weights, position)
    if shape.form == "decoupled" and position is not None and shape.nope:
        cost, _ = _pair_energies(layer, position, weights)
        lost_keys += _pairs_energy(to_complex(rest, position), cost, sigma)
    return ExplainedEnergy(_share(lost_keys, total_keys), _share(lost_values, total_values))


def _share(lost: float, total: float) -> float:
    return 1.0 - lost / total if total > 0 else 1.0


def calibrated_weights(
    layer: HeadMaps, queries: Tensor, second_moment: Tensor, distances: Tensor, frequencies: Tensor | None
) -> LatentWeights:
    """Return the weights that text gives: `queries` (H, D, D), `second_moment` (d̃, d̃), `distances` (H, T)."""
    kept = None if frequencies is None else mean_turn(frequencies, distances)
    return LatentWeights(queries, output_energy(layer), damped(second_moment, DAMPING), kept)
