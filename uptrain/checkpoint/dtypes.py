"""Convert safetensors bytes to numpy arrays and back; bfloat16 and float8 with ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from uptrain.errors import UptrainError

Array = npt.NDArray[Any]

_NUMPY: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_, "C64": np.complex64,
}  # fmt: skip


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy dtype for safetensors `dtype`, in native byte order (safetensors is little-endian)."""
    found: np.dtype[Any] = np.dtype(_NUMPY[dtype])
    return found


def is_float(dtype: str) -> bool:
    """Tell whether safetensors `dtype` is a real floating-point dtype."""
    return "F" in dtype


def as_float32(array: Array) -> npt.NDArray[np.float32]:
    """Convert a floating-point array of any shape to float32, exactly for every dtype except float64."""
    if array.dtype == ml_dtypes.bfloat16:
        # A shift is exact, and several times faster than the scalar cast of ml_dtypes.
        wide = array.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return array.astype(np.float32)


def cast(array: Array, dtype: str, name: str) -> Array:
    """Round `array` to safetensors `dtype`.

    Raises:
        UptrainError: a finite value of tensor `name` is too large for `dtype`.
    """
    target = numpy_dtype(dtype)
    if array.dtype == target:
        return array
    # Compared by exponent: float32 and bfloat16 have the same, so that cast needs no pass over the values.
    if _range(target).maxexp < _range(array.dtype).maxexp:
        limit = float(_range(target).max)
        finite = np.abs(as_float32(array))
        largest = float(finite.max(initial=0.0, where=np.isfinite(finite)))
        if largest > limit:
            raise UptrainError(
                f"Tensor {name} has values up to {largest:.3g}, which {dtype} can't hold.", "Use --dtype bfloat16."
            )
    with np.errstate(over="ignore"):
        return array.astype(target)


def _range(dtype: np.dtype[Any]) -> ml_dtypes.finfo:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


def raw_bytes(array: Array) -> memoryview:
    """Return the bytes of a C-contiguous array without copying them."""
    flat = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
    return memoryview(flat)  # type: ignore[arg-type]
