"""The activations of a source's own layers, which several conversions of the source share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from uptrain.conversion.calibration.activations import Activations, activation_bytes


@dataclass
class ActivationCache:
    """The outputs of the source's layers and of their attention, (blocks, T, d) float32 each on the CPU, by layer.

    A cache belongs to one source and one set of blocks. It holds nothing where memory can't hold all layers: then every
    conversion runs the source again.
    """

    _stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Return the bytes that it holds."""
        return sum(tensor.nbytes for pair in self._stored.values() for tensor in pair)

    def store(self, layer: int, layers: int, activations: Activations, memory: int) -> None:
        """Store what a layer made.

        - `layer`: the layer's number.
        - `layers`: how many layers the source has.
        - `activations`: what the layer made.
        - `memory`: bytes that all layers and the activations may take; nothing is stored if they take more.
        """
        shape = (len(activations.target), *activations.target[0].shape)
        if activation_bytes(shape, layers) <= memory:
            outputs = torch.stack(list(activations.attention_output)), torch.stack(list(activations.target))
            self._stored[layer] = outputs

    def restore(self, layer: int, activations: Activations) -> bool:
        """Fill `activations` with what a layer made, and return whether it was stored."""
        if layer not in self._stored:
            return False
        for block, (attention, target) in enumerate(zip(*self._stored[layer], strict=True)):
            activations.attention_output[block], activations.target[block] = attention, target
        return True
