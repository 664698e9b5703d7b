"""What a calibration makes of a model's layers, fewer heads or a latent: an object that answers for its kind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Generic

import torch
from torch import Tensor

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.mla_projections import LatentHeads
from uptrain.architectures.projections import LayerHeads, read_layer
from uptrain.architectures.rope_parameters import EVERY, FULL, SLIDING
from uptrain.checkpoint.dtypes import as_float32
from uptrain.conversion.calibration.candidates import (
    KEY_WEIGHTS,
    CandidateMaker,
    DecoupledLatent,
    PlainLatent,
    SharedHeads,
)
from uptrain.conversion.calibration.head_sharing import CANDIDATES
from uptrain.conversion.calibration.made_layer import CalibratedLayer
from uptrain.conversion.calibration.refit import Maps
from uptrain.conversion.calibration.statistics import VALUE_SQUARES
from uptrain.conversion.calibration_quality import QUALITIES
from uptrain.methods.head_conversion import ModuleWeights, heads_of, maps_of, rotary_of
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.mla import LatentShape
from uptrain.methods.mla_conversion import heads_of_latent, maps_of_latent
from uptrain.methods.mla_layer import LatentMaps
from uptrain.models.rotary_tables import Table, rotary_tables

KEPT = max(quality.settings.refitted for quality in QUALITIES.values())
"""The most candidates from one kind of activations that stay while those from another are made."""


@dataclass(frozen=True, kw_only=True)
class SourceLayer:
    """One of the source's layers: its heads, its attention, and the device that its candidates are computed on."""

    heads: LayerHeads
    spec: AttentionSpec
    device: torch.device

    @property
    def output_bias(self) -> Tensor | None:
        """Return the output projection's bias (d,), float32 on the device, None where it has none."""
        bias = self.heads.part("o").bias
        return None if bias is None else torch.from_numpy(as_float32(bias)).to(self.device)


@dataclass(frozen=True, kw_only=True)
class CalibrationTarget(ABC, Generic[Maps]):
    """What the layers of `source` become.

    - `source`: the open checkpoint and what its config says.
    - `arrange`: puts a layer's heads in another order first, without changing any output; None for the source's order.
    """

    source: CheckpointDescription
    arrange: Callable[[LayerHeads], LayerHeads] | None = None

    @property
    def before(self) -> tuple[AttentionSpec, ...]:
        """Return the attention of the source's layers."""
        return self.source.attention

    def read(self, index: int) -> LayerHeads:
        """Return one layer's heads, as the checkpoint stores them."""
        source = self.source
        base = source.attention_name(index)
        return read_layer(source.checkpoint, source.family.projections, self.before[index], base)

    def arranged(self, index: int) -> LayerHeads:
        """Return one layer's heads in the order in which they are converted."""
        heads = self.read(index)
        return heads if self.arrange is None else self.arrange(heads)

    @property
    @abstractmethod
    def unchanged(self) -> bool:
        """Whether every layer stays as it is."""

    @abstractmethod
    def maker(self, layer: SourceLayer) -> CandidateMaker[Maps]:
        """Return what makes candidates for a layer, and runs the layer with them."""

    @abstractmethod
    def maps(self, made: CalibratedLayer) -> Maps:
        """Return a converted layer's arrays as tensors, in their own dtype."""

    @abstractmethod
    def arrays(self, maps: Maps, heads: LayerHeads) -> CalibratedLayer:
        """Return a converted layer's tensors as arrays; the output's bias is that of the source's `heads`."""

    @property
    @abstractmethod
    def moments(self) -> int:
        """Count the square matrices of inputs that hold a layer's statistics, by peaks of real runs."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Count the bytes that one weight of attention takes, in float64 and in the candidates, while they are made."""

    @property
    @abstractmethod
    def extra_activations(self) -> int:
        """Count the tensors of mixed heads that a block needs besides the layer's own, by peaks of real runs."""


@dataclass(frozen=True, kw_only=True)
class HeadsTarget(CalibrationTarget[HeadMaps]):
    """Fewer key/value heads in each layer: `groups` of them."""

    groups: int

    @property
    def unchanged(self) -> bool:
        """Whether there are as many groups as heads."""
        return self.groups == self.before[0].num_key_value_heads

    def maker(self, layer: SourceLayer) -> SharedHeads:
        """Return what shares the layer's heads."""
        family = self.source.family
        position = rotary_of(family.position, layer.spec)
        return SharedHeads(
            source=layer.heads,
            weights=ModuleWeights(family.projections, layer.spec),
            position=position,
            groups=self.groups,
            inverse_frequencies=None if position is None else self._inverse_frequencies(layer.spec),
            device=layer.device,
        )

    @cached_property
    def _tables(self) -> dict[str, Table]:
        return rotary_tables(self.source.config)

    def _inverse_frequencies(self, spec: AttentionSpec) -> Tensor:
        """Return a layer's inverse frequencies (pairs,), in radians per token, as the source's own class has them."""
        kind = EVERY if EVERY in self._tables else SLIDING if spec.sliding_window else FULL
        return torch.tensor(self._tables[kind].short, dtype=torch.float64)

    def maps(self, made: CalibratedLayer) -> HeadMaps:
        """Return shared heads as tensors."""
        if not isinstance(made, LayerHeads):
            raise TypeError("a latent is no layer of shared heads")
        return maps_of(made)

    def arrays(self, maps: HeadMaps, heads: LayerHeads) -> LayerHeads:
        """Return shared heads as arrays."""
        return heads_of(maps, heads)

    @property
    def moments(self) -> int:
        """Count those of all groups' stacked keys and averaged values, and nine of one group to compute with."""
        spec = self.before[0]
        width = spec.num_key_value_heads // self.groups * spec.head_dim
        square = (width / self.source.hidden_size) ** 2
        values = max(self.groups * square, min(spec.num_attention_heads * square, VALUE_SQUARES))
        return math.ceil((self.groups + 9) * square + values)

    @property
    def weight_bytes(self) -> int:
        """Count the source's, each candidate's on the device, and one that is computed."""
        return 8 + 4 * (CANDIDATES + KEPT) + 8

    @property
    def extra_activations(self) -> int:
        """Count none: the layer's own attention runs."""
        return 0


@dataclass(frozen=True, kw_only=True)
class MLATarget(CalibrationTarget[LatentMaps]):
    """A latent in each layer.

    - `shape`: the latent's sizes and rotary pairs.
    - `inverse_frequencies`: the source's, (pairs,) in radians per token; empty where keys see no rotation.
    - `attention_factor`: what the source's rotary tables are multiplied by.
    - `key_weight`: the only weight of keys to try, None for `KEY_WEIGHTS`.
    """

    shape: LatentShape
    inverse_frequencies: tuple[float, ...] = ()
    attention_factor: float = 1.0
    key_weight: float | None = None

    @property
    def unchanged(self) -> bool:
        """Return False: a latent is another layer."""
        return False

    def maker(self, layer: SourceLayer) -> CandidateMaker[LatentMaps]:
        """Return what makes latents of the layer."""
        family = self.source.family
        position = rotary_of(family.position, layer.spec)
        key_weights = KEY_WEIGHTS if self.key_weight is None else (self.key_weight,)
        inverse_frequencies = torch.tensor(self.inverse_frequencies, dtype=torch.float64)
        if self.shape.rope.shares_key:
            return DecoupledLatent(
                source=layer.heads,
                position=position,
                shape=self.shape,
                inverse_frequencies=inverse_frequencies,
                device=layer.device,
                output_bias=layer.output_bias,
                factor=self.attention_factor,
                key_weights=key_weights,
            )
        return PlainLatent(
            source=layer.heads,
            weights=ModuleWeights(family.projections, layer.spec),
            position=position,
            shape=self.shape,
            inverse_frequencies=inverse_frequencies if self.inverse_frequencies else None,
            device=layer.device,
            key_weights=key_weights,
        )

    def maps(self, made: CalibratedLayer) -> LatentMaps:
        """Return a latent as tensors."""
        if not isinstance(made, LatentHeads):
            raise TypeError("shared heads are no latent")
        return maps_of_latent(made)

    def arrays(self, maps: LatentMaps, heads: LayerHeads) -> LatentHeads:
        """Return a latent as arrays."""
        return heads_of_latent(maps, heads.part("o").bias)

    @property
    def moments(self) -> int:
        """Count two dozen: one latent serves all heads, and its fit holds products of moments with all queries."""
        return 24

    @property
    def weight_bytes(self) -> int:
        """Count the source's, each candidate's on the device, and one that is computed."""
        return 8 + 4 * (len(KEY_WEIGHTS) + KEPT) + 8

    @property
    def extra_activations(self) -> int:
        """Count four: queries, keys, values and their mixture in attention of its own."""
        return 4
