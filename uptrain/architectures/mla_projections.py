"""One layer's latent attention by head, and how each target class stores it. Pure array functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.mla_rope import MLARope
from uptrain.checkpoint.dtypes import Array

A = TypeVar("A")
"""An array of numpy or a tensor of torch."""

NEUTRAL_EPS = 1e-6
"""The ε that transformers hard-codes in the norm on the latent."""
NEUTRAL_WEIGHT = 2.0**20
"""The norm's weight in its neutral form; a power of two, so that no dtype rounds it."""
NEUTRAL_SCALE = NEUTRAL_EPS**0.5 / NEUTRAL_WEIGHT
"""The factor of the latent's rows. With it ε outweighs their energy, so that the norm multiplies by 1/√ε alone."""


@dataclass(frozen=True)
class MLASpec:
    """What an attention layer becomes.

    - `rope`: where the positions of its keys are.
    - `kv_lora_rank`: values of the latent per token.
    - `qk_rope_head_dim`: dims of the rotary key that all heads share.
    - `qk_nope_head_dim`: unrotated dims of a head's key.
    - `inverse_frequencies`: the source's (D/2,), in radians per token; empty where no shared rotary key needs them.
    - `rope_pairs`: the index in `inverse_frequencies` that each pair of the shared rotary key has.
    - `attention_factor`: what the source's rotary tables are multiplied by.
    - `key_weight`: weight of key error relative to value error; None for the method's default or its search.
    """

    rope: MLARope
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    inverse_frequencies: tuple[float, ...] = ()
    rope_pairs: tuple[int, ...] = ()
    attention_factor: float = 1.0
    key_weight: float | None = None


@dataclass(frozen=True)
class LatentParts(Generic[A]):
    """One layer's latent attention by head. H query heads, G heads that the latent expands to, input size d.

    - `q_nope`, `q_rope`: (H, Dn, d) and (H, Dr, d), the queries for unrotated keys and for the shared rotary key.
    - `down`: (r, d), the latent's map.
    - `k_rope`: (Dr, d), the shared rotary key's map.
    - `k_up`, `v_up`: (G, Dn, r) and (G, Dv, r), what expands the latent to keys and values.
    - `o`: (out, H, Dv).
    - `q_nope_bias`, `q_rope_bias`, `down_bias`, `k_rope_bias`: (H, Dn), (H, Dr), (r,) and (Dr,); None without biases.

    Rotary rows are in neighbouring pairs.

    Source: DeepSeek-AI 2024, DeepSeek-V2, section 2.1.2 and 2.1.3.
    """

    q_nope: A
    q_rope: A
    down: A
    k_rope: A
    k_up: A
    v_up: A
    o: A
    q_nope_bias: A | None = None
    q_rope_bias: A | None = None
    down_bias: A | None = None
    k_rope_bias: A | None = None


@dataclass(frozen=True)
class LatentHeads(LatentParts[Array]):
    """One layer's latent attention as arrays, with the output's bias, (out,) or None."""

    o_bias: Array | None = None


@dataclass(frozen=True)
class MLASchema:
    """How a target class stores a latent layer. Data only.

    Attributes:
        output: the name of the output projection.
        output_transposed: whether its weight is (in, out).
        per_query: whether the latent expands to one key and value per query head.
        fold_scale: whether the class multiplies logits by (Dn + Dr)^-½. The ratio to the source's head_dim^-½ then goes
            into the queries.
        neutral: whether the class has a norm on the latent, which small rows and a large weight turn into the identity.
    """

    output: str = "o_proj"
    output_transposed: bool = False
    per_query: bool = True
    fold_scale: bool = False
    neutral: bool = False


@dataclass(frozen=True)
class MLAStorage:
    """How one conversion stores its latent layers.

    Attributes:
        schema: how the target class stores them.
        output_scale: the factor of the output projection.
        q_lora_rank: the rank of low-rank queries, None for whole queries.
    """

    schema: MLASchema
    output_scale: float = 1.0
    q_lora_rank: int | None = None


def join_latent(heads: LatentHeads, stored: MLAStorage, head_dim: int) -> dict[str, Array]:
    """Join a latent layer into the modules of a target class ("q_proj.weight", …); `head_dim` is the source's.

    Source: DeepSeek-AI 2024, DeepSeek-V2, section 2.1 for the projections.
    """
    schema = stored.schema
    width = heads.q_nope.shape[1] + heads.q_rope.shape[1]
    scale = (width / head_dim) ** 0.5 if schema.fold_scale else 1.0
    out: dict[str, Array] = {}
    query = _flat(np.concatenate([heads.q_nope, heads.q_rope], axis=1)) * scale
    if stored.q_lora_rank is None:
        out["q_proj.weight"] = query
    else:
        out |= _low_rank_queries(query, stored.q_lora_rank)
    out |= _bias("q_proj", _joined(heads.q_nope_bias, heads.q_rope_bias, axis=1))
    latent = heads.down * NEUTRAL_SCALE if schema.neutral else heads.down
    out["kv_a_proj_with_mqa.weight"] = np.concatenate([latent, heads.k_rope])
    out |= _bias("kv_a_proj_with_mqa", _joined(heads.down_bias, heads.k_rope_bias, axis=0))
    if schema.neutral:
        out["kv_a_layernorm.weight"] = np.full(len(latent), NEUTRAL_WEIGHT)
    up = np.concatenate([heads.k_up, heads.v_up], axis=1)
    if schema.per_query:
        up = np.repeat(up, len(heads.q_nope) // len(up), axis=0)
    out["kv_b_proj.weight"] = _flat(up)
    output = heads.o.reshape(len(heads.o), -1) * stored.output_scale
    out[f"{schema.output}.weight"] = output.T if schema.output_transposed else output
    return out | _bias(schema.output, None if heads.o_bias is None else heads.o_bias * stored.output_scale)


def latent_shapes(
    stored: MLAStorage, spec: AttentionSpec, hidden_size: int, biased: bool, output_bias: bool
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of one layer, in the order of `join_latent`.

    - `stored`: how the layers are stored.
    - `spec`: the attention's sizes in the result.
    - `hidden_size`: the width of the hidden states.
    - `biased`: whether queries and the latent have biases.
    - `output_bias`: whether the output projection has a bias.
    """
    schema, rank = stored.schema, spec.kv_lora_rank or 0
    nope, rope, value = spec.qk_nope_head_dim or 0, spec.qk_rope_head_dim, spec.v_head_dim or spec.head_dim
    query, latent = spec.num_attention_heads * (nope + rope), rank + rope
    out: dict[str, tuple[int, ...]] = {}
    if stored.q_lora_rank is None:
        out["q_proj.weight"] = (query, hidden_size)
    else:
        out["q_a_proj.weight"] = (stored.q_lora_rank, hidden_size)
        out["q_a_layernorm.weight"] = (stored.q_lora_rank,)
        out["q_b_proj.weight"] = (query, stored.q_lora_rank)
    if biased:
        out["q_proj.bias"] = (query,)
    out["kv_a_proj_with_mqa.weight"] = (latent, hidden_size)
    if biased:
        out["kv_a_proj_with_mqa.bias"] = (latent,)
    if schema.neutral:
        out["kv_a_layernorm.weight"] = (rank,)
    out["kv_b_proj.weight"] = (spec.num_key_value_heads * (nope + value), rank)
    mixed = spec.num_attention_heads * value
    out[f"{schema.output}.weight"] = (mixed, hidden_size) if schema.output_transposed else (hidden_size, mixed)
    if output_bias:
        out[f"{schema.output}.bias"] = (hidden_size,)
    return out


def _low_rank_queries(query: Array, rank: int) -> dict[str, Array]:
    """Split the queries' map into two with a neutral norm between them; a rank equal to the input's width is exact."""
    if rank == query.shape[1]:
        down, up = np.eye(rank), query
    else:
        left, singular, right = np.linalg.svd(query.astype(np.float64), full_matrices=False)
        down, up = right[:rank], left[:, :rank] * singular[:rank]
    return {
        "q_a_proj.weight": down * NEUTRAL_SCALE,
        "q_a_layernorm.weight": np.full(rank, NEUTRAL_WEIGHT),
        "q_b_proj.weight": up,
    }


def _flat(by_head: Array) -> Array:
    return by_head.reshape(-1, by_head.shape[-1])


def _joined(one: Array | None, two: Array | None, axis: int) -> Array | None:
    return None if one is None or two is None else np.concatenate([one, two], axis=axis).reshape(-1)


def _bias(module: str, bias: Array | None) -> dict[str, Array]:
    return {} if bias is None else {f"{module}.bias": bias}
