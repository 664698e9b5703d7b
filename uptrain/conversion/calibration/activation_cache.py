"""What a source's own layers make of calibration blocks, kept so that several conversions of it run them once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from uptrain.conversion.calibration.activations import Streams, stream_bytes


@dataclass
class SourceRun:
    """Keep the layers' outputs and their attention's, (blocks, T, d) float32 each on the CPU, by layer.

    Where memory can't hold all layers, nothing is kept and every conversion runs the source again. One belongs to one
    source and one set of blocks.
    """

    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the bytes that are kept."""
        return sum(tensor.nbytes for pair in self._kept.values() for tensor in pair)

    def keep(self, layer: int, layers: int, streams: Streams, memory: int) -> None:
        """Remember what `layer` made, as `streams` has it, if `memory` bytes hold all `layers` and the streams."""
        if stream_bytes((len(streams.target), *streams.target[0].shape), layers) <= memory:
            self._kept[layer] = (torch.stack(list(streams.attended)), torch.stack(list(streams.target)))

    def lend(self, layer: int, streams: Streams) -> bool:
        """Fill `streams` with what `layer` made, and tell whether it was kept."""
        if layer not in self._kept:
            return False
        for block, (attended, target) in enumerate(zip(*self._kept[layer], strict=True)):
            streams.attended[block], streams.target[block] = attended, target
        return True
