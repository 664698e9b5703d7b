"""NaN and infinity are seen in every dtype, and nothing else is taken for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from uptrain.checkpoint.dtypes import Array
from uptrain.checkpoint.nonfinite import finite
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.errors import CheckpointError


def look(checkpoint: Checkpoint) -> None:
    """Read tensor x, whose bytes must come through as they are."""
    found = b"".join(bytes(chunk) for chunk in finite(checkpoint, "x", "hint"))
    assert found == b"".join(bytes(chunk) for chunk in checkpoint.chunks("x"))


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2],
)
def test_every_dtype_says_what_isfinite_says(tmp_path: Path, dtype: type) -> None:
    """Every bit pattern of 8 and 16 bits, and the edges of the wider ones."""
    width = np.dtype(dtype).itemsize
    if width <= 2:
        values: Array = np.arange(2 ** (8 * width), dtype=f"u{width}").view(dtype)
    else:
        limits = np.finfo(dtype)
        values = np.array([0, -0.0, limits.max, limits.min, limits.tiny, np.inf, -np.inf, np.nan], dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(values.astype(np.float64))
    assert refuses(tmp_path, values[finite]) is False
    for value in values[~finite][:: max(1, int((~finite).sum()) // 16)]:
        assert refuses(tmp_path, np.array([0, value, 0], dtype)), value


def refuses(tmp_path: Path, values: Array) -> bool:
    save_file({"x": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    try:
        look(open_checkpoint(tmp_path))
    except CheckpointError:
        return True
    return False


@pytest.mark.parametrize("size", [1, 3, 5])
def test_values_cut_in_two_by_short_reads_are_still_seen(tmp_path: Path, size: int) -> None:
    """Network file systems may hand out fewer bytes than asked for."""

    class Short(Checkpoint):
        def chunks(self, name: str) -> Iterator[memoryview]:
            whole = b"".join(bytes(chunk) for chunk in super().chunks(name))
            yield from (memoryview(whole)[start : start + size] for start in range(0, len(whole), size))

    for values, bad in (([1.0, 2.0, 3.0], False), ([1.0, 2.0, np.nan], True)):
        save_file({"x": np.array(values, np.float32)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        whole = open_checkpoint(tmp_path)
        short = Short(whole.path, whole.config, whole.tensors)
        if bad:
            with pytest.raises(CheckpointError, match="NaN or infinity in tensor x"):
                look(short)
        else:
            look(short)
