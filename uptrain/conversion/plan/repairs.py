"""Which tensors outside attention a calibration may change: the layers' norms and MLPs."""

from __future__ import annotations

from uptrain.architectures.description import CheckpointDescription
from uptrain.checkpoint.header import FLOAT_DTYPES, TensorInfo

_MATRIX = 2
"""Dims of a matrix. Tensors of more hold experts, each of which few tokens reach."""


def repairable(source: CheckpointDescription, layer: int) -> dict[str, str]:
    """Return the tensors of a layer that block repair may change: their names in the checkpoint, by path in the layer.

    These are the norms and the MLP. Experts stay, because a short text says too little of each.
    """
    base, attention = f"{source.prefix}{source.family.inside()[0]}.{layer}.", source.attention_name(layer)
    return {
        name.removeprefix(base): name
        for name, info in source.tensors.items()
        if name.startswith(base) and not name.startswith(attention) and _moves(source, info)
    }


def repairable_names(source: CheckpointDescription) -> frozenset[str]:
    """Return the names of all tensors that block repair may change."""
    layers = range(len(source.attention))
    return frozenset(name for layer in layers for name in repairable(source, layer).values())


def _moves(source: CheckpointDescription, info: TensorInfo) -> bool:
    buffer = any(info.name.endswith(f".{buffer}") for buffer in source.family.buffers)
    return info.dtype in FLOAT_DTYPES.values() and len(info.shape) <= _MATRIX and not buffer
