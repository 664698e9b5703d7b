"""What a source's own layers make of calibration blocks, kept so that several conversions of it run them once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from uptrain.methods.streams import ITEM, Streams


@dataclass
class SourceRun:
    """Keep the layers' outputs and their attention's, (blocks, T, d) float32 each on the CPU, by layer.

    `memory`, in bytes, bounds them together with a conversion's own streams; where it can't hold all layers, nothing
    is kept and every conversion runs the source again. One belongs to one source and one set of blocks.
    """

    memory: int
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def keep(self, layer: int, layers: int, streams: Streams) -> None:
        """Remember what `layer`, one of `layers`, made, as `streams` has it."""
        held = (2 * layers + 4) * math.prod(streams.target.shape) * ITEM
        if held <= self.memory:
            self._kept[layer] = (streams.attended.clone(), streams.target.clone())

    def lend(self, layer: int, streams: Streams) -> bool:
        """Fill `streams` with what `layer` made, and tell whether it was kept."""
        if layer not in self._kept:
            return False
        attended, target = self._kept[layer]
        streams.attended.copy_(attended)
        streams.target.copy_(target)
        return True
