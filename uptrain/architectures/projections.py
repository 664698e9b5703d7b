"""Split the projections of a layer's attention into heads, and join heads into any packing. Pure array functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.schema import BLOCKS, Packing, Projections
from uptrain.checkpoint.dtypes import Array
from uptrain.checkpoint.reader import Checkpoint

PARTS = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Heads:
    """One projection split by head, in the checkpoint's own dtype.

    `weight` is (heads, head_dim, hidden_size) for q, k and v and (hidden_size, heads, head_dim) for o; `bias` is
    (heads, head_dim), and (hidden_size,) for o.
    """

    weight: Array
    bias: Array | None = None


@dataclass(frozen=True)
class LayerHeads:
    """A layer's projections by head; a part is None where it was not read."""

    q: Heads | None = None
    k: Heads | None = None
    v: Heads | None = None
    o: Heads | None = None

    def part(self, name: str) -> Heads:
        """Return the part q, k, v or o, which must be there."""
        value = {"q": self.q, "k": self.k, "v": self.v, "o": self.o}[name]
        if value is None:
            raise KeyError(name)
        return value

    def with_parts(self, **parts: Heads) -> LayerHeads:
        """Return the layer with some parts replaced."""
        return replace(self, **parts)


def module_of(projections: Projections, part: str) -> str:
    """Name the linear module that holds part q, k, v or o."""
    if projections.fused and part != "o":
        return projections.fused
    return {"q": projections.q, "k": projections.k, "v": projections.v, "o": projections.o}[part]


def modules_of(projections: Projections, parts: frozenset[str]) -> tuple[str, ...]:
    """Name the linear modules that hold `parts`, each once, in the order q, k, v, o."""
    return tuple(dict.fromkeys(module_of(projections, part) for part in PARTS if part in parts))


def read_layer(
    checkpoint: Checkpoint,
    projections: Projections,
    spec: AttentionSpec,
    base: str,
    parts: frozenset[str] = frozenset(PARTS),
) -> LayerHeads:
    """Read the modules that hold `parts` of one attention, and split them into heads.

    - `checkpoint`: the open checkpoint.
    - `projections`: how the family stores them.
    - `spec`: the attention's sizes.
    - `base`: how the attention's tensor names begin ("model.layers.0.self_attn.").
    - `parts`: which of q, k, v and o to read.
    """
    names = [f"{module}.{kind}" for module in modules_of(projections, parts) for kind in ("weight", "bias")]
    stored = {name: checkpoint.read(base + name) for name in names if base + name in checkpoint.tensors}
    return split(projections, spec, stored)


def split(projections: Projections, spec: AttentionSpec, tensors: Mapping[str, Array]) -> LayerHeads:
    """Split the modules in `tensors` ("c_attn.weight", …) into heads; a missing module stays None."""
    parts: dict[str, Heads] = {}
    for part in PARTS:
        name = module_of(projections, part)
        if f"{name}.weight" not in tensors:
            continue
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        weight = weight.T if projections.transposed else weight
        if part == "o":
            heads = (spec.num_attention_heads, spec.v_head_dim or spec.head_dim)
            parts[part] = Heads(weight.reshape(weight.shape[0], *heads), bias)
            continue
        rows = _rows(projections, spec, part)
        shape = (-1, spec.head_dim)
        parts[part] = Heads(
            weight[rows].reshape(*shape, weight.shape[1]), None if bias is None else bias[rows].reshape(shape)
        )
    return LayerHeads(**parts)


def join(projections: Projections, spec: AttentionSpec, heads: LayerHeads) -> dict[str, Array]:
    """Join heads into the modules of `projections`; the inverse of `split`."""
    out: dict[str, Array] = {}
    present = {part: getattr(heads, part) for part in PARTS if getattr(heads, part) is not None}
    if "o" in present:
        output = present.pop("o")
        out.update(_module(projections, projections.o, output.weight.reshape(len(output.weight), -1), output.bias))
    if not projections.fused:
        for part, value in present.items():
            out.update(_module(projections, module_of(projections, part), *_flat(value)))
        return out
    if present:
        weights, biases = zip(*(_flat(present[part]) for part in "qkv"), strict=True)
        every = np.arange(sum(len(weight) for weight in weights))
        order = np.argsort(np.concatenate([every[_rows(projections, spec, part)] for part in "qkv"]))
        bias = None if biases[0] is None else np.concatenate(biases)[order]
        out.update(_module(projections, projections.fused, np.concatenate(weights)[order], bias))
    return out


def module_shape(projections: Projections, spec: AttentionSpec, name: str, hidden_size: int) -> tuple[int, int]:
    """Return the shape of the linear module `name`: (out, in), or (in, out) in families that store it transposed.

    - `projections`: how the family stores the modules.
    - `spec`: the attention's sizes.
    - `name`: the module.
    - `hidden_size`: the width of the hidden states.
    """
    q = spec.num_attention_heads * spec.head_dim
    k = spec.num_key_value_heads * spec.head_dim
    if name == projections.o:
        shape = (hidden_size, q)
    elif name == projections.fused:
        shape = (q + 2 * k, hidden_size)
    else:
        shape = (q if name == projections.q else k, hidden_size)
    return (shape[1], shape[0]) if projections.transposed else shape


def _flat(heads: Heads) -> tuple[Array, Array | None]:
    weight = heads.weight.reshape(-1, heads.weight.shape[-1])
    return weight, None if heads.bias is None else heads.bias.reshape(-1)


def _module(projections: Projections, name: str, weight: Array, bias: Array | None) -> dict[str, Array]:
    weight = np.ascontiguousarray(weight.T if projections.transposed else weight)
    return {f"{name}.weight": weight, **({} if bias is None else {f"{name}.bias": bias})}


def _rows(projections: Projections, spec: AttentionSpec, part: str) -> slice | Array:
    """Return the rows of the stored projection that hold `part`, head by head; a slice where no copy is needed."""
    heads, groups, head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    if projections.packing is Packing.SEPARATE:
        return slice(None)
    if projections.packing is Packing.CONCAT:
        start, count = {"q": (0, heads), "k": (heads, groups), "v": (heads + groups, groups)}[part]
        return slice(start * head_dim, (start + count) * head_dim)
    if projections.packing is Packing.BLOCKS:
        rows = np.arange(3 * heads * head_dim).reshape(BLOCKS, 3, -1)
        return np.asarray(rows[:, "qvk".index(part)].reshape(-1))
    per_group = heads // groups
    rows_of_heads = np.arange(groups * (per_group + 2)).reshape(groups, per_group + 2)
    columns = {"q": slice(per_group), "k": slice(per_group, per_group + 1), "v": slice(per_group + 1, None)}
    chosen = rows_of_heads[:, columns[part]].reshape(-1, 1)
    return np.asarray((chosen * head_dim + np.arange(head_dim)).reshape(-1))
