"""Pool key/value heads into groups without looking at data.

Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models", section 2.1 and figure 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from uptrain.architectures.projections import Heads, LayerHeads
from uptrain.checkpoint.dtypes import Array, as_float32

Pool = Callable[[Array, int], Array]


def mean(heads: Array, groups: int) -> Array:
    """Average each run of heads: (heads, …) of any floating dtype to (groups, …) float32, summed in float32."""
    per_group = len(heads) // groups
    means = np.empty((groups, *heads.shape[1:]), np.float32)
    # A head at a time: what is summed stays in cache, and nothing but the result is as large as it.
    for group, total in enumerate(means):
        total[:] = as_float32(heads[group * per_group])
        for head in heads[group * per_group + 1 : (group + 1) * per_group]:
            total += as_float32(head)
    means /= per_group
    return means


def first(heads: Array, groups: int) -> Array:
    """Keep the first head of each run: (heads, …) to (groups, …) in the heads' own dtype."""
    return heads[:: len(heads) // groups]


def fresh(shape: tuple[int, ...], std: float, seed: int, layer: int, part: str) -> Array:
    """Draw new heads from N(0, std²) in float32; the same for the same seed, layer and part, in any order."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, layer, ord(part)])))
    return np.asarray(generator.standard_normal(shape, dtype=np.float32) * np.float32(std))


POOLS: Mapping[str, Pool] = {"mean": mean, "first": first}


def pool_layer(
    layer: LayerHeads, groups: int, method: str, *, seed: int = 0, index: int = 0, std: float = 0.02
) -> LayerHeads:
    """Return the layer with `groups` key/value heads; queries and output stay as they are.

    `std` is the deviation of `random` heads, whose biases are zero; `index` is the layer's number.
    """
    parts: dict[str, Heads] = {}
    for part in ("k", "v"):
        heads = layer.part(part)
        if method == "random":
            weight = fresh((groups, *heads.weight.shape[1:]), std, seed, index, part)
            bias = None if heads.bias is None else np.zeros((groups, *heads.bias.shape[1:]), np.float32)
        else:
            pool = POOLS[method]
            weight = pool(heads.weight, groups)
            bias = None if heads.bias is None else pool(heads.bias, groups)
        parts[part] = Heads(weight, bias)
    return layer.with_parts(**parts)


def pool_norm(weight: Array, heads: int, groups: int, method: str) -> Array:
    """Return a norm's weight, (heads · head_dim,) or (heads, head_dim), for `groups` heads in the same form.

    It is pooled as the heads are; `random` heads get a fresh norm's ones.
    """
    by_head = weight.reshape(heads, -1)
    pooled = np.ones((groups, by_head.shape[1]), np.float32) if method == "random" else POOLS[method](by_head, groups)
    return pooled.reshape(-1, *weight.shape[1:])
