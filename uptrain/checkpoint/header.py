"""Read a safetensors header: names, dtypes, shapes and spans, checked before use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from uptrain.checkpoint.jsonfile import parse_object
from uptrain.checkpoint.weight_files import SAVE_AGAIN
from uptrain.errors import CheckpointError

ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "C64": 64,
}  # fmt: skip
"""Bits per value of each safetensors dtype."""

FLOAT_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The safetensors names of the floating-point dtypes, by their names in `--dtype` and config.json."""

HEADER_LIMIT = 100_000_000
"""Bytes; the limit of the safetensors library itself."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor and its place: `start` and `end` are byte offsets in `file`, -1 where that isn't safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Return the tensor's size in bytes."""
        return tensor_bytes(self.dtype, self.shape)


MOST_DIMS = 64
"""The most dims of a numpy array."""


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of safetensors `dtype` and `shape`."""
    return math.prod(shape) * ITEM_BITS[dtype] // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of the safetensors file `path`, in the order of the bytes.

    Raises:
        CheckpointError: the file is cut short, too large or not JSON, a dtype, shape or span is invalid, or bytes
            overlap or are left over.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file.")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path} is cut short or not safetensors.", "Download it again.")
            if length > HEADER_LIMIT:
                raise CheckpointError(f"{path} declares a header of {length:,} bytes, over the format's limit.")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {os.strerror(error.errno or 0)}.") from None
    entries = parse_object(text, f"The header of {path}")
    entries.pop("__metadata__", None)
    infos = [_tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    position = 8 + length
    for info in infos:
        if info.start != position:
            raise CheckpointError(f"{path}: the bytes of {info.name} overlap another tensor's or leave a gap.")
        position = info.end
    if position != size:
        word = "cut short" if size < position else "longer than its header says"
        raise CheckpointError(
            f"{path} is {word}: {size:,} bytes where the header promises {position:,}.", "Download it again."
        )
    return {info.name: info for info in infos}


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    where = f"{path}: the header's entry for {name!r}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} is not an object.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise CheckpointError(f"{where} has dtype {dtype!r}, which uptrain can't read.")
    if not _naturals(shape):
        raise CheckpointError(f"{where} has shape {shape!r}, not a list of sizes.")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {offsets!r}, not [begin, end].")
    # A size of 0 makes the product 0, but numpy still can't make an array of that shape.
    if len(shape) > MOST_DIMS or math.prod(max(1, size) for size in shape) >= 2**63 // ITEM_BITS[dtype]:
        raise CheckpointError(f"{where} has a shape of {len(shape)} dims that no tensor can have.")
    info = TensorInfo(name, dtype, tuple(shape), path.name, base + offsets[0], base + offsets[1])
    if info.end - info.start != info.nbytes:
        raise CheckpointError(
            f"{where} spans {info.end - info.start:,} bytes where {dtype} {list(info.shape)} takes {info.nbytes:,}."
        )
    return info


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def read_shard(folder: Path, name: str) -> dict[str, TensorInfo]:
    """Return the tensors of the safetensors file `name`, a path relative to `folder`.

    Raises:
        CheckpointError: as `read_header`.
    """
    found = read_header(folder / name)
    # The header's reader knows only the last part of the name.
    return {key: replace(info, file=name) for key, info in found.items()} if "/" in name else found


def merge_shards(
    shards: Iterable[tuple[str, Mapping[str, TensorInfo]]],
    weight_map: Mapping[str, str],
    where: str | Path,
    equal: Callable[[TensorInfo, TensorInfo], bool],
) -> dict[str, TensorInfo]:
    """Return the tensors of all shards; of a tensor in two shards the later copy, which transformers reads.

    - `shards`: each shard's name and tensors, in the order in which transformers reads them.
    - `weight_map`: the shard in which the index lists each tensor.
    - `where`: what errors call the checkpoint.
    - `equal`: tells whether two tensors of the same dtype and shape hold the same values.

    Raises:
        CheckpointError: a tensor's two copies differ, and the index lists the one that transformers doesn't read.
    """
    out: dict[str, TensorInfo] = {}
    for shard, tensors in shards:
        for name, info in tensors.items():
            earlier = out.pop(name, None)
            out[name] = info
            if earlier is None or weight_map.get(name) == shard:
                continue
            same = (earlier.dtype, earlier.shape) == (info.dtype, info.shape) and equal(earlier, info)
            if not same:
                raise CheckpointError(
                    f"{where} has two different tensors {name}: the index lists that of "
                    f"{weight_map.get(name, 'neither')}, transformers reads that of {shard}.",
                    f"Where transformers is right, let it save the model again. {SAVE_AGAIN} Else remove the "
                    f"tensor from {shard}.",
                )
    return out
