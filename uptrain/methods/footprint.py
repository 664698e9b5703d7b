"""How much memory a calibration takes beside its activations."""

from __future__ import annotations

import math
from collections.abc import Iterable

import psutil

from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reader import Checkpoint
from uptrain.methods.calibrate import Target


def held_bytes() -> int:
    """Return how much memory this process holds now."""
    held: int = psutil.Process().memory_info().rss
    return held


def working_bytes(checkpoint: Checkpoint, target: Target, tokens: int) -> int:
    """Estimate the most bytes that embedding, or converting one layer on blocks of `tokens` tokens, takes at a time.

    An embedding is read in its own dtype and widened to float32. A layer's weights are float32; the moments of each
    group, what is factored from them and the refit's equations are square matrices of float64, attention's
    probabilities and the layer's own activations float32. The counts are those that peaks of real runs fit.
    """
    base = f"{target.prefix}{target.architecture.inside()[0]}."
    inside = [info for name, info in checkpoint.tensors.items() if name.startswith(f"{base}0.")]
    beside = [info for name, info in checkpoint.tensors.items() if not name.startswith(base)]
    embedding = 4 * _values(beside) + max((info.nbytes for info in beside), default=0)
    spec, hidden_size = target.before[0], int(checkpoint.config[target.architecture.keys.hidden_size])
    square = 8 * max(hidden_size + 1, spec.num_attention_heads * (spec.v_head_dim or spec.head_dim)) ** 2
    moments = 4 * (target.groups if target.latent is None else 2) + 8
    probabilities = 3 * 4 * spec.num_attention_heads * tokens**2
    activations = 4 * tokens * _values(inside) // hidden_size
    return max(embedding, 4 * _values(inside) + square * moments + probabilities + activations)


def _values(tensors: Iterable[TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors)
