"""Which norms on keys have weights of their own for every head, and what those become when heads are pooled."""

from __future__ import annotations

from dataclasses import dataclass

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.schema import KeyNorm
from uptrain.checkpoint.header import TensorInfo
from uptrain.errors import CheckpointError


@dataclass(frozen=True)
class PooledNorm:
    """A norm's weight in the result, `name` of `shape`: made from `sources`, whose `heads` become `groups`."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    heads: int
    groups: int


def pooled_norms(source: CheckpointDescription, after: tuple[AttentionSpec, ...]) -> list[PooledNorm]:
    """Return what becomes of every norm weight that is pooled with the key heads.

    Raises:
        CheckpointError: a weight is missing, or not of the heads that the config promises.
    """
    norm = source.key_norm
    if norm is None or not norm.by_head:
        return []
    out = []
    for layer, (spec, pooled) in enumerate(zip(source.attention, after, strict=True)):
        base, groups = source.attention_name(layer), pooled.num_key_value_heads
        infos = [_weight(source, name, spec, norm) for name in _names(norm, base, spec.num_key_value_heads)]
        per_group, shape = spec.num_key_value_heads // groups, infos[0].shape
        if len(infos) == 1:
            rows = shape[0] // per_group
            out.append(
                PooledNorm(infos[0].name, (rows, *shape[1:]), (infos[0].name,), spec.num_key_value_heads, groups)
            )
            continue
        for group in range(groups):
            run = infos[group * per_group : (group + 1) * per_group]
            out.append(PooledNorm(infos[group].name, shape, tuple(info.name for info in run), per_group, 1))
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
