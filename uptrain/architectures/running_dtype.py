"""The dtype that a checkpoint's model runs in, and so what a value in its cache takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from uptrain.architectures.validation import DTYPE_KEYS
from uptrain.checkpoint.dtypes import is_float
from uptrain.checkpoint.header import FLOAT_DTYPES, ITEM_BITS


def cached_itemsize(config: Mapping[str, Any], stored: Iterable[str]) -> int:
    """Return the bytes of a cached value: of config.json's dtype, else of the first floating one that is `stored`.

    `stored` are safetensors dtypes. Floats of 8 bits are only ever stored; where nothing else is known, a value takes
    16 bits.

    Source: transformers, `PreTrainedModel.from_pretrained`, argument `dtype="auto"`.
    """
    named = (FLOAT_DTYPES.get(str(config.get(key)).removeprefix("torch.")) for key in DTYPE_KEYS)
    floats = (dtype for dtype in stored if is_float(dtype) and ITEM_BITS[dtype] >= 16)
    found = next((dtype for dtype in named if dtype), None) or next(floats, "BF16")
    return ITEM_BITS[found] // 8
