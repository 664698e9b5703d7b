"""Activations of all calibration blocks between two layers: in memory, or in memory-mapped files above a limit."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from uptrain.errors import UptrainError

ITEM = 4
"""Bytes of one activation, float32."""


@dataclass
class Streams:
    """Hold hidden states before a layer, all (blocks, T, d) float32 on the CPU.

    `original` runs through the source's layers and `converted` through the converted ones; `target` is the
    original's next state and `attended` its attention's output, both filled layer by layer.
    """

    original: Tensor
    converted: Tensor
    target: Tensor
    attended: Tensor

    def advance(self) -> None:
        """Make the target the original stream of the next layer."""
        self.original, self.target = self.target, self.original


@contextmanager
def open_streams(shape: tuple[int, int, int], memory: int, folder: Path | None) -> Iterator[Streams]:
    """Lend streams for (blocks, T, d); above `memory` bytes in all they are files in `folder`, removed afterwards.

    Raises:
        UptrainError: they must be files, and the folder's disk has too little room.
    """
    needed = 4 * math.prod(shape) * ITEM
    if needed <= memory or folder is None:
        yield Streams(*(torch.empty(shape) for _ in range(4)))
        return
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UptrainError(
            f"Calibration needs {needed:,} bytes in {folder} for activations, which is {needed - free:,} too many.",
            "Use fewer calibration tokens, or allow more memory.",
        )
    with tempfile.TemporaryDirectory(prefix=".activations-", dir=folder, ignore_cleanup_errors=True) as inner:
        yield Streams(*(_mapped(Path(inner) / f"{name}.bin", shape) for name in "octa"))


def _mapped(path: Path, shape: tuple[int, int, int]) -> Tensor:
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.float32).view(shape)
