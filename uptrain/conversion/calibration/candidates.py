"""Candidates for a calibrated layer, fewer heads or a latent: how each kind is made and run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from uptrain.architectures.projections import LayerHeads
from uptrain.conversion.calibration.attention_probabilities import Reached
from uptrain.conversion.calibration.head_sharing import share_layer
from uptrain.conversion.calibration.layer_runner import Layer, LayerOnBlock, NumberedBlocks
from uptrain.conversion.calibration.refit import Maps
from uptrain.conversion.calibration.statistics import gather_moments, latent_moments
from uptrain.methods.head_conversion import ModuleWeights, maps_of
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.method import Converted
from uptrain.methods.mla import LatentShape
from uptrain.methods.mla_calibrated import fitted_latents
from uptrain.methods.mla_layer import Angles, LatentMaps, mix_heads
from uptrain.methods.rotary import Rotary

KEY_WEIGHTS = (1.0, 4.0, 16.0)
"""Weights of key energy relative to value energy in a latent that are tried."""

M = TypeVar("M", HeadMaps, LatentMaps)


class CandidateMaker(Protocol[Maps]):
    """Makes candidates for a layer from activations, and runs the layer with one."""

    def make(self, layer: Layer, hidden: NumberedBlocks) -> list[Converted[Maps]]:
        """Return candidates from blocks of hidden states before the layer."""

    def run(self, layer: LayerOnBlock, hidden: Tensor, maps: Maps) -> Tensor:
        """Return the layer's output (T, d) with `maps` as its attention."""

    def mix(self, layer: LayerOnBlock, hidden: Tensor, maps: Maps) -> Tensor:
        """Return the mixed heads (T, H·Dv), the output projection's input."""


@dataclass(frozen=True, kw_only=True)
class SharedHeads:
    """`groups` key/value heads, run by the source's own attention with heads repeated."""

    source: LayerHeads
    weights: ModuleWeights
    position: Rotary | None
    groups: int
    inverse_frequencies: Tensor | None
    device: torch.device

    def make(self, layer: Layer, hidden: NumberedBlocks) -> list[Converted[HeadMaps]]:
        """Return the calibrated factorisations."""
        source = maps_of(self.source)
        narrow = self.weights.parameters(as_float(source, self.device))
        moments = gather_moments(layer, source, narrow, self.groups, hidden)
        del narrow
        found = share_layer(source, self.groups, self.position, self.inverse_frequencies, moments)
        return [Converted(as_float(each.layer, self.device), each.explained) for each in found]

    def run(self, layer: LayerOnBlock, hidden: Tensor, maps: HeadMaps) -> Tensor:
        """Run the layer with the heads repeated."""
        return layer.run(hidden, self.weights.parameters(maps))

    def mix(self, layer: LayerOnBlock, hidden: Tensor, maps: HeadMaps) -> Tensor:
        """Return the mixed heads."""
        return layer.mix(hidden, self.weights.parameters(maps))


@dataclass(frozen=True, kw_only=True)
class PlainLatent:
    """A latent that expands to plain heads, run by the source's own attention with low-rank projections."""

    source: LayerHeads
    weights: ModuleWeights
    position: Rotary | None
    shape: LatentShape
    inverse_frequencies: Tensor | None
    device: torch.device
    key_weights: tuple[float, ...] = KEY_WEIGHTS

    def make(self, layer: Layer, hidden: NumberedBlocks) -> list[Converted[LatentMaps]]:
        """Return the calibrated factorisation at each key weight."""
        return _latents(self, layer, hidden)

    def run(self, layer: LayerOnBlock, hidden: Tensor, maps: LatentMaps) -> Tensor:
        """Run the layer with the latent expanded."""
        return layer.run(hidden, self.weights.parameters(maps.expanded()))

    def mix(self, layer: LayerOnBlock, hidden: Tensor, maps: LatentMaps) -> Tensor:
        """Return the mixed heads."""
        return layer.mix(hidden, self.weights.parameters(maps.expanded()))


@dataclass(frozen=True, kw_only=True)
class DecoupledLatent:
    """A latent and a shared rotary key, run by attention of its own inside the source's layer.

    `factor` multiplies the rotary tables, as scaled variants of RoPE ask for.
    """

    source: LayerHeads
    position: Rotary | None
    shape: LatentShape
    inverse_frequencies: Tensor
    device: torch.device
    output_bias: Tensor | None = None
    factor: float = 1.0
    key_weights: tuple[float, ...] = KEY_WEIGHTS

    def make(self, layer: Layer, hidden: NumberedBlocks) -> list[Converted[LatentMaps]]:
        """Return the calibrated factorisation at each key weight."""
        return _latents(self, layer, hidden)

    def run(self, layer: LayerOnBlock, hidden: Tensor, maps: LatentMaps) -> Tensor:
        """Run the layer with the latent's own attention."""
        flat = maps.o.flatten(1)

        def attend(x: Tensor, mask: Tensor | None) -> Tensor:
            return torch.nn.functional.linear(self._mixed(layer, x, mask, maps), flat, self.output_bias)

        return layer.run_with(hidden, attend)

    def mix(self, layer: LayerOnBlock, hidden: Tensor, maps: LatentMaps) -> Tensor:
        """Return the mixed heads."""

        def attend(x: Tensor, mask: Tensor | None) -> Tensor:
            raise Reached(self._mixed(layer, x, mask, maps))

        try:
            layer.run_with(hidden, attend)
        except Reached as reached:
            mixed: Tensor = reached.value
            return mixed
        raise RuntimeError("the layer never reached its attention")

    def _mixed(self, layer: LayerOnBlock, x: Tensor, mask: Tensor | None, maps: LatentMaps) -> Tensor:
        angles = Angles.at(self.inverse_frequencies[list(self.shape.pairs)], layer.positions, self.factor)
        return mix_heads(maps, x, angles, mask, layer.scale)


def _latents(maker: PlainLatent | DecoupledLatent, layer: Layer, hidden: NumberedBlocks) -> list[Converted[LatentMaps]]:
    source = maps_of(maker.source)
    moments = latent_moments(layer, source, hidden, maker.inverse_frequencies)
    found = fitted_latents(source, maker.shape, maker.position, moments, maker.key_weights)
    return [Converted(as_float(maps, maker.device), {"calibrated": explained}) for maps, explained in found]


def as_float(maps: M, device: torch.device) -> M:
    """Return maps in float32 on a device, row by row: products may round by how factors lie."""
    values: dict[str, Any] = {
        name: None if value is None else value.float().to(device).contiguous() for name, value in vars(maps).items()
    }
    return type(maps)(**values)
