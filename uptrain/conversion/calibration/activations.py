"""Activations of all calibration blocks between two layers: in memory, or in files where that is too small."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from uptrain.checkpoint.dtypes import raw_bytes
from uptrain.errors import UptrainError

ITEM = 4
"""Bytes of one activation, float32."""


class Blocks(Protocol):
    """Blocks of activations, each (T, d) float32 on the CPU, read and replaced one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, block: int) -> Tensor: ...

    def __setitem__(self, block: int, value: Tensor) -> None: ...

    def __iter__(self) -> Iterator[Tensor]: ...


class FileBlocks:
    """Blocks (T, d) float32 in a file. It is read and written, not mapped: its pages would count as the process's."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._path, self._shape = path, shape
        self._bytes = shape[1] * shape[2] * ITEM
        self._file = path.open("x+b", buffering=0)

    def __len__(self) -> int:
        return self._shape[0]

    def __getitem__(self, block: int) -> Tensor:
        value = torch.empty(self._shape[1:])
        buffer = raw_bytes(value.numpy())
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[done:]], block * self._bytes + done)
            if not count:
                raise UptrainError(f"{self._path} ends before block {block}: it changed while being used.")
            done += count
        return value

    def __setitem__(self, block: int, value: Tensor) -> None:
        buffer = raw_bytes(value.contiguous().numpy())
        done = 0
        while done < len(buffer):
            done += os.pwrite(self._file.fileno(), buffer[done:], block * self._bytes + done)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[block] for block in range(len(self)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class Activations:
    """The hidden states around one layer, all (blocks, T, d) float32 on the CPU.

    - `original`: before the layer, through the source's layers.
    - `converted`: before the layer, through the converted layers.
    - `target`: after the source's own layer; filled layer by layer.
    - `attention_output`: of the source's own layer; filled layer by layer.
    """

    original: Blocks
    converted: Blocks
    target: Blocks
    attention_output: Blocks

    def advance(self) -> None:
        """Go on to the next layer: the target is what the source's next layer reads."""
        self.original, self.target = self.target, self.original


def activation_bytes(shape: tuple[int, int, int], layers: int = 0) -> int:
    """Return the bytes of activations (blocks, T, d), and of an `ActivationCache` of `layers` layers of the source."""
    blocks, tokens, size = shape
    return (2 * layers + 4) * blocks * tokens * size * ITEM


@contextmanager
def open_activations(shape: tuple[int, int, int], memory: int, folder: Path | None) -> Iterator[Activations]:
    """Lend activations of (blocks, T, d); above `memory` bytes in all they are files in `folder`, removed afterwards.

    Raises:
        UptrainError: they must be files, and the folder's disk has too little room.
    """
    needed = activation_bytes(shape)
    if needed <= memory or folder is None:
        yield Activations(*(torch.empty(shape) for _ in range(4)))
        return
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UptrainError(
            f"Calibration needs {needed:,} bytes in {folder} for activations, which is {needed - free:,} too many.",
            "Use fewer calibration tokens, or allow more memory.",
        )
    with (
        tempfile.TemporaryDirectory(prefix=".activations-", dir=folder, ignore_cleanup_errors=True) as inner,
        ExitStack() as opened,
    ):
        files = [
            FileBlocks(Path(inner) / name, shape) for name in ("original", "converted", "target", "attention_output")
        ]
        for file in files:
            opened.callback(file.close)
        yield Activations(*files)
