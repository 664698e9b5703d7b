"""Look for NaN and infinity in a tensor's bytes while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType

import numpy as np

from uptrain.checkpoint.header import ITEM_BITS, TensorInfo
from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import CheckpointError

# A value is NaN or infinite when all bits under the mask are set: the bits of the exponent or, in formats without
# infinity, the bits of the one pattern that means NaN.
_MASKS = MappingProxyType(
    {
        "F64": 0x7FF0_0000_0000_0000, "C64": 0x7F80_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80,
        "F8_E5M2": 0x7C, "F8_E4M3": 0x7F, "F8_E8M0": 0xFF,
    }
)  # fmt: skip


ALLOW = "Download the checkpoint again, or keep such values with --allow-nonfinite."
"""The hint for a source with such values outside attention."""


def finite(checkpoint: Checkpoint, name: str, hint: str) -> Iterator[memoryview]:
    """Yield the bytes of tensor `name` as `Checkpoint.chunks` does, while its values are finite.

    Raises:
        CheckpointError: a value is NaN or infinite, and `hint` says what to do; the file can't be read.
    """
    return only_finite(checkpoint.chunks(name), checkpoint.tensors[name], checkpoint.path, hint)


def only_finite(chunks: Iterable[memoryview], info: TensorInfo, path: Path, hint: str) -> Iterator[memoryview]:
    """Yield the bytes of a tensor while its values are finite.

    - `chunks`: the bytes.
    - `info`: the tensor.
    - `path`: the checkpoint's folder.
    - `hint`: what the user can do; it ends the error.

    Raises:
        CheckpointError: the next chunk holds NaN or infinity; `hint` says what to do.
    """
    mask = _MASKS.get(info.dtype)
    width = 4 if info.dtype == "C64" else max(1, ITEM_BITS[info.dtype] // 8)
    rest = b""
    for chunk in chunks:
        if mask is not None:
            # Some file systems return fewer bytes than requested, and may cut a value in two.
            whole = rest + chunk if rest else chunk
            end = len(whole) // width * width
            rest = bytes(whole[end:])
            if end and not _finite(whole[:end], mask, width):
                raise CheckpointError(f"{path / info.file} has NaN or infinity in tensor {info.name}.", hint)
        yield chunk


def _finite(data: memoryview | bytes, mask: int, width: int) -> bool:
    # The largest signed number is the largest positive value, and the largest unsigned number the largest negative one;
    # the exponent has the highest bits. Two passes without a copy are many times faster than isfinite.
    sign = 1 << (8 * width - 1)
    signed, unsigned = np.frombuffer(data, f"<i{width}"), np.frombuffer(data, f"<u{width}")
    return bool(signed.max() < mask and unsigned.max() < mask | sign)
