"""Pool key/value heads into groups without looking at data.

Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models", section 2.1 and figure 4.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from uptrain.architectures.projections import Heads, LayerHeads
from uptrain.checkpoint.dtypes import Array, as_float32

Pool = Callable[[Array, int], Array]


def mean(heads: Array, groups: int) -> Array:
    """Average each run of heads: (heads, …) of any floating dtype to (groups, …) float32, summed in float32."""
    per_group = len(heads) // groups
    means = np.empty((groups, *heads.shape[1:]), np.float32)
    # One head at a time: the sum stays in the processor's cache, and nothing but the result is as large.
    for group, total in enumerate(means):
        total[:] = as_float32(heads[group * per_group])
        for head in heads[group * per_group + 1 : (group + 1) * per_group]:
            total += as_float32(head)
    means /= per_group
    return means


def first(heads: Array, groups: int) -> Array:
    """Return the first head of each run: (heads, …) to (groups, …) in the heads' own dtype."""
    return heads[:: len(heads) // groups]


def fresh(shape: tuple[int, ...], std: float, seed: int, layer: int, part: str) -> Array:
    """Draw heads from N(0, std²) in float32; the same seed, layer and part give the same heads, in any order.

    - `shape`: the shape of the result.
    - `std`: the standard deviation.
    - `seed`: the seed.
    - `layer`: the layer's number.
    - `part`: one letter, k or v.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, layer, ord(part)])))
    return np.asarray(generator.standard_normal(shape, dtype=np.float32) * np.float32(std))


def ones(heads: Array, groups: int) -> Array:
    """Return a fresh norm's ones, (groups, …) float32, for the norm of heads (heads, …) that are drawn again."""
    return np.ones((groups, *heads.shape[1:]), np.float32)


def pool_layer(layer: LayerHeads, groups: int, pool: Pool) -> LayerHeads:
    """Return the layer with `groups` key/value heads, pooled by `pool`; queries and output stay as they are."""
    return layer.with_parts(**{part: _pooled(layer.part(part), groups, pool) for part in ("k", "v")})


def random_layer(layer: LayerHeads, groups: int, index: int, seed: int, std: float) -> LayerHeads:
    """Return the layer with `groups` fresh key/value heads, drawn from N(0, `std`²), whose biases are zero.

    - `layer`: the layer, whose queries and output stay as they are.
    - `groups`: how many key/value heads the result has.
    - `index`: the layer's number; each layer gets other values.
    - `seed`: the seed; the same seed gives the same heads.
    - `std`: the standard deviation, in the unit of the weights.
    """
    parts: dict[str, Heads] = {}
    for part in ("k", "v"):
        heads = layer.part(part)
        weight = fresh((groups, *heads.weight.shape[1:]), std, seed, index, part)
        bias = None if heads.bias is None else np.zeros((groups, *heads.bias.shape[1:]), np.float32)
        parts[part] = Heads(weight, bias)
    return layer.with_parts(**parts)


def pool_norm(weight: Array, heads: int, groups: int, pool: Pool) -> Array:
    """Return a key norm's weight for `groups` heads, in the form of the given one, pooled as the heads are.

    - `weight`: (heads · head_dim,) or (heads, head_dim).
    - `heads`: how many key heads it is for.
    - `groups`: how many key heads the result is for.
    - `pool`: what pools the heads.
    """
    return pool(weight.reshape(heads, -1), groups).reshape(-1, *weight.shape[1:])


def _pooled(heads: Heads, groups: int, pool: Pool) -> Heads:
    return Heads(pool(heads.weight, groups), None if heads.bias is None else pool(heads.bias, groups))
