"""The dtype and the device that a loaded model computes in."""

from __future__ import annotations

from typing import Any

import torch

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dtype_named(name: str | None) -> torch.dtype | None:
    """Return the torch dtype of a name such as bfloat16."""
    return None if name is None else _DTYPES[name]


def place_model(model: Any, device: torch.device | None, dtype: torch.dtype) -> Any:
    """Return the model on `device` (None: where it is) and in `dtype`. A quantized model keeps its dtypes."""
    if holds_codes(model):
        return model if device is None else model.to(device)
    return model.to(device=device, dtype=dtype)


def holds_codes(model: Any) -> bool:
    """Tell whether a loaded model computes with quantized weights, which no other dtype can represent."""
    floats = _DTYPES.values()
    narrow = any(parameter.dtype not in (*floats, torch.float64) for parameter in model.parameters())
    return narrow or getattr(model, "hf_quantizer", None) is not None
