"""How much memory a calibration takes besides its activations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import psutil
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.calibration.attention_probabilities import VALUES, in_parts
from uptrain.conversion.calibration.targets import CalibrationTarget

CODE = 36 * 2**20
"""Bytes of torch's kernels, their buffers and the model's own class, in memory once they are used."""


def held_bytes() -> int:
    """Return the bytes of memory that this process holds now."""
    held: int = psutil.Process().memory_info().rss
    return held


def working_bytes(target: CalibrationTarget[Any], tokens: int, checked: int, repairs_blocks: bool = False) -> int:
    """Estimate the most bytes that converting one layer on blocks of `tokens` tokens, `checked` held out, takes.

    A layer's weights and the activations of one block are float32. In addition there are, first, the float64 moments of
    each group, the probabilities that they are gathered from, and the heads in both precisions; later, the float64
    equations of the refit and the held-out blocks. Where a run `repairs_blocks`, the layer's weights follow as they
    were, with gradients and Adam's two moments. The counts fit the measured peaks of real runs.
    """
    checkpoint = target.source.checkpoint
    base = f"{target.source.prefix}{target.source.family.inside()[0]}.0."
    spec, hidden_size = target.before[0], target.source.hidden_size
    weights = _values(info for name, info in checkpoint.tensors.items() if name.startswith(base))
    mixed = spec.num_attention_heads * (spec.v_head_dim or spec.head_dim)
    square = 8 * max(hidden_size + 1, mixed) ** 2
    heads = 2 * hidden_size * (spec.num_attention_heads + spec.num_key_value_heads) * spec.head_dim
    activations = 4 * tokens * (weights // hidden_size + target.extra_activations * mixed)
    moments = target.weight_bytes * heads + square * target.moments
    probabilities = 3 * 4 * _probabilities(checkpoint, spec.num_attention_heads, tokens)
    held = 4 * checked * tokens * (mixed + 2 * hidden_size)
    refit = 8 * heads + 9 * square + held
    repair = 4 * 4 * weights + activations if repairs_blocks else 0
    return CODE + 4 * weights + activations + max(moments + probabilities, refit, repair)


def mask_bytes(target: CalibrationTarget[Any], tokens: int, blocks: int) -> int:
    """Return the most bytes of the masks of `blocks` blocks of `tokens` tokens that hold several documents each.

    They are kept as bits, one mask for each width of sliding window; one of them at a time is as the layer reads it.
    """
    windows = len({spec.sliding_window for spec in target.before})
    return tokens**2 * (windows * blocks // 8 + 8) if blocks else 0


def _probabilities(checkpoint: Checkpoint, heads: int, tokens: int) -> int:
    """Return how many probabilities the code of the checkpoint's family computes at a time."""
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    whole = heads * tokens**2
    return min(VALUES, whole) if in_parts(family) else whole


def _values(tensors: Iterable[TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors)
