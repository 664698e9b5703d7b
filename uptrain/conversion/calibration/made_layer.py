"""What a calibration makes of one layer, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from uptrain.architectures.mla_projections import LatentHeads
from uptrain.architectures.projections import LayerHeads
from uptrain.checkpoint.dtypes import Array

CalibratedLayer = LayerHeads | LatentHeads
"""A converted layer's attention as arrays, (float32) as the conversion writes it."""


@dataclass(frozen=True)
class MadeLayer:
    """A converted layer: its `attention`, and `others`, what changed outside of it, float32 by name in the source."""

    attention: CalibratedLayer
    others: Mapping[str, Array] = field(default_factory=dict)
