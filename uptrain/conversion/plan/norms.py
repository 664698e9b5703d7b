"""Plan what becomes of key norms that have weights for each head, when heads are pooled."""

from __future__ import annotations

from collections.abc import Callable

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.schema import KeyNorm
from uptrain.checkpoint.header import TensorInfo
from uptrain.conversion.plan.operations import PoolKeyNorm, new_info
from uptrain.errors import CheckpointError
from uptrain.methods.method import Method


def pooled_norms(
    source: CheckpointDescription,
    after: tuple[AttentionSpec, ...],
    method: Method,
    dtype: Callable[[str], str],
) -> list[PoolKeyNorm]:
    """Return what becomes of every norm weight that is pooled with the key heads.

    - `source`: the checkpoint.
    - `after`: the result's attention, layer by layer.
    - `method`: pools the weights as it pools heads.
    - `dtype`: gives the result's dtype of a tensor, by the source's.

    Raises:
        CheckpointError: a weight is missing, or not of the heads that the config promises.
    """
    norm = source.key_norm
    if norm is None or not norm.by_head:
        return []
    if method.pool_norm is None:
        raise ValueError(f"--method {method.name} pools no key norm")
    out = []
    for layer, (spec, pooled) in enumerate(zip(source.attention, after, strict=True)):
        base, groups = source.attention_name(layer), pooled.num_key_value_heads
        infos = [_weight(source, name, spec, norm) for name in _names(norm, base, spec.num_key_value_heads)]
        per_group, shape = spec.num_key_value_heads // groups, infos[0].shape
        if len(infos) == 1:
            # One weight has the rows of all heads.
            runs, shape, heads, kept = [infos], (shape[0] // per_group, *shape[1:]), spec.num_key_value_heads, groups
        else:
            runs = [infos[group * per_group : (group + 1) * per_group] for group in range(groups)]
            heads, kept = per_group, 1
        for first, run in zip(infos, runs, strict=False):
            output = new_info(first.name, dtype(run[0].dtype), shape)
            sources = tuple(info.name for info in run)
            out.append(PoolKeyNorm(output=output, sources=sources, heads=heads, groups=kept, pool=method.pool_norm))
    return out


def _names(norm: KeyNorm, base: str, heads: int) -> list[str]:
    modules = dict.fromkeys(norm.module.format(head=head) for head in range(heads))
    return [f"{base}{module}.weight" for module in modules]


def _weight(source: CheckpointDescription, name: str, spec: AttentionSpec, norm: KeyNorm) -> TensorInfo:
    info = source.tensors.get(name)
    if info is None:
        raise CheckpointError(f"Tensor {name} is missing.", "Download the checkpoint again.")
    heads, head_dim = spec.num_key_value_heads, spec.head_dim
    fits = [(head_dim,)] if "{head}" in norm.module else [(heads * head_dim,), (heads, head_dim)]
    if info.shape not in fits:
        raise CheckpointError(
            f"Tensor {name} is {list(info.shape)} where config.json promises {heads} heads of {head_dim}."
        )
    return info
