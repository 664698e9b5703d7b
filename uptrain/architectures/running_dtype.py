"""The dtype in which a checkpoint's model runs, and so the bytes per cached value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from uptrain.architectures.validation import DTYPE_KEYS
from uptrain.checkpoint.dtypes import is_float
from uptrain.checkpoint.header import FLOAT_DTYPES, ITEM_BITS


def cached_itemsize(config: Mapping[str, Any], stored: Iterable[str]) -> int:
    """Return the bytes per cached value: in config.json's dtype, else in the first floating-point dtype of `stored`.

    `stored` are safetensors dtypes. No model runs in 8-bit floats, so those are skipped. Where nothing else is known, a
    value has 16 bits.

    Source: transformers, `PreTrainedModel.from_pretrained`, argument `dtype="auto"`.
    """
    named = (FLOAT_DTYPES.get(str(config.get(key)).removeprefix("torch.")) for key in DTYPE_KEYS)
    floats = (dtype for dtype in stored if is_float(dtype) and ITEM_BITS[dtype] >= 16)
    found = next((dtype for dtype in named if dtype), None) or next(floats, "BF16")
    return ITEM_BITS[found] // 8
