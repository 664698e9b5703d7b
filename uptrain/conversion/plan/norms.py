"""Which norms on keys have weights of their own for every head, and what those become when heads are pooled."""

from __future__ import annotations

from dataclasses import dataclass

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import key_norm_of
from uptrain.architectures.schema import Architecture, KeyNorm
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import CheckpointError


@dataclass(frozen=True)
class PooledNorm:
    """A norm's weight in the result, `name` of `shape`: made from `sources`, whose `heads` become `groups`."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    heads: int
    groups: int


def pooled_norms(
    checkpoint: Checkpoint,
    architecture: Architecture,
    prefix: str,
    before: tuple[AttentionSpec, ...],
    after: tuple[AttentionSpec, ...],
) -> list[PooledNorm]:
    """Return what becomes of every norm weight that is pooled with the key heads.

    Raises:
        CheckpointError: a weight is missing, or not of the heads that the config promises.
    """
    norm = key_norm_of(architecture, checkpoint.config)
    if norm is None or not norm.by_head:
        return []
    out = []
    for layer, (spec, pooled) in enumerate(zip(before, after, strict=True)):
        base, groups = architecture.attention(prefix, layer), pooled.num_key_value_heads
        infos = [_weight(checkpoint, name, spec, norm) for name in _names(norm, base, spec.num_key_value_heads)]
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


def _weight(checkpoint: Checkpoint, name: str, spec: AttentionSpec, norm: KeyNorm) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(f"Tensor {name} is missing.", "Download the checkpoint again.")
    heads, head_dim = spec.num_key_value_heads, spec.head_dim
    fits = [(head_dim,)] if "{head}" in norm.module else [(heads * head_dim,), (heads, head_dim)]
    if info.shape not in fits:
        raise CheckpointError(
            f"Tensor {name} is {list(info.shape)} where config.json promises {heads} heads of {head_dim}."
        )
    return info
