"""Read trusted `.bin` shards with torch's restricted unpickler; used only with --allow-pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from uptrain.checkpoint.dtypes import Array, numpy_dtype
from uptrain.checkpoint.header import FLOAT_DTYPES, TensorInfo
from uptrain.errors import CheckpointError, needing

_INTEGERS = {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


class PickleShards:
    """The `.bin` files of one folder, mapped into memory where their format allows; tensors are read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shards: dict[str, dict[str, Any]] = {}

    def header(self, name: str) -> dict[str, TensorInfo]:
        """Return every tensor of the file `name`.

        Raises:
            CheckpointError: it isn't a weights-only pickle, or holds something else than tensors.
        """
        out: dict[str, TensorInfo] = {}
        for key, tensor in self._shard(name).items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            code = FLOAT_DTYPES.get(dtype) or _INTEGERS.get(dtype)
            if code is None:
                raise CheckpointError(f"{self.path / name}: tensor {key} has dtype {dtype}.")
            out[key] = TensorInfo(key, code, tuple(tensor.shape), name, -1, -1)
        return out

    def read(self, info: TensorInfo) -> Array:
        """Return one tensor as an array of its own dtype and shape."""
        import torch

        tensor = self._shard(info.file)[info.name].contiguous()
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        return np.asarray(flat.view(numpy_dtype(info.dtype)).reshape(info.shape))

    def _shard(self, name: str) -> dict[str, Any]:
        if name not in self._shards:
            with needing(f"Reading {name}"):
                import torch
            try:
                # torch before 1.6 wrote one stream, which can't be mapped: it is read into memory.
                mapped = zipfile.is_zipfile(self.path / name)
                shard = torch.load(self.path / name, map_location="cpu", weights_only=True, mmap=mapped)
            except Exception as error:  # the unpickler can raise anything for malicious bytes
                first = next(iter(str(error).splitlines()), type(error).__name__)
                raise CheckpointError(f"{self.path / name} can't be read as weights: {first}") from None
            plain = isinstance(shard, dict) and all(
                isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
                for name, value in shard.items()
            )
            if not plain:
                raise CheckpointError(f"{self.path / name} holds something other than named tensors.")
            self._shards[name] = shard
        return self._shards[name]
