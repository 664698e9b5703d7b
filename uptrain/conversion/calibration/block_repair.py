"""Repair a whole converted layer: gradient steps on its output that also move its norms and its MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from uptrain.checkpoint.dtypes import Array
from uptrain.conversion.calibration.layer_runner import Layer
from uptrain.conversion.calibration.refit import Maps, descend, trainable


@dataclass(frozen=True, kw_only=True)
class BlockSteps:
    """The gradient steps of one layer's block repair: how many, how large relative to each tensor's rms, and a seed."""

    count: int
    rate: float
    seed: int


class LayerTensors:
    """The tensors of a lent layer outside its attention that may change, and what they were before.

    - `layer`: the layer, with its weights.
    - `names`: the tensors' names in the checkpoint, by their paths in the layer.
    """

    def __init__(self, layer: Layer, names: Mapping[str, str]) -> None:
        own = dict(layer.module.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: own[path] for path, name in names.items() if path in own}
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def write(self, values: Mapping[str, Array]) -> None:
        """Put arrays in the place of what the layer has, by the tensors' names in the checkpoint."""
        for name, value in values.items():
            self.parameters[name].copy_(torch.from_numpy(value))

    def changed(self) -> dict[str, Array]:
        """Return the tensors that steps have changed, float32, by their names in the checkpoint."""
        return {
            name: np.array(self.parameters[name].detach().cpu().numpy(), np.float32)
            for name, before in self._before.items()
            if not torch.equal(self.parameters[name], before)
        }

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo all steps."""
        for name, before in self._before.items():
            self.parameters[name].copy_(before)
        self._before = {}

    def steps(self, maps: Maps, loss: Callable[[Maps, int], Tensor], batches: Sequence[int], steps: BlockSteps) -> Maps:
        """Return maps after gradient steps that also move these tensors, in place.

        - `maps`: the layer's attention, float32.
        - `loss`: returns the loss of the layer with such maps on one batch.
        - `batches`: the batches' numbers.
        - `steps`: how the steps are taken.
        """
        self._before = {name: value.detach().clone() for name, value in self.parameters.items()}
        trained: dict[str, Tensor] = trainable(maps)
        others: list[nn.Parameter] = list(self.parameters.values())
        current = replace(maps, **trained)
        for other in others:
            other.requires_grad_(True)
        try:
            moving: list[Tensor] = [*trained.values(), *others]
            descend(moving, lambda batch: loss(current, batch), batches, steps.count, steps.rate, steps.seed)
        finally:
            for other in others:
                other.requires_grad_(False)
                other.grad = None
        return replace(maps, **{name: value.detach() for name, value in trained.items()})
