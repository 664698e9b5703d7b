"""How long a calibration will take, from one layer run on one block before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from uptrain.conversion.calibration.head_sharing import CANDIDATES
from uptrain.conversion.calibration.layer_runner import LayerOnBlock
from uptrain.conversion.calibration.layer_search import held_out
from uptrain.conversion.calibration_settings import CalibrationSettings

BACKWARD = 2.5
"""Time of a step's gradients, in forward passes."""


def seconds_per_layer(layer: LayerOnBlock, hidden: Tensor, settings: CalibrationSettings, blocks: int) -> float:
    """Return about how many seconds converting a layer takes, right to a factor of two.

    - `layer`: one of the source's layers, on a block.
    - `hidden`: the block's hidden states (T, d), float32.
    - `settings`: what is tried.
    - `blocks`: how many blocks there are.
    """
    whole = _seconds(lambda: layer.run(hidden))
    mixed = layer.mix(hidden)
    mix = _seconds(lambda: layer.mix(hidden)) + 3 * _seconds(lambda: mixed.mT @ mixed)
    probe = _seconds(lambda: torch.stack([part.sum() for part in layer.attention_weights(hidden)[1]]))
    checks = len(held_out(blocks, settings.held_out))
    tried = len(settings.moments) * CANDIDATES + settings.refitted * len(settings.drifts) + 2
    fitted = blocks + settings.refitted * min(settings.trials, blocks) + (blocks if settings.independent else 0)
    probed = len(settings.moments) * min(settings.probes, blocks)
    steps = (1 + BACKWARD) * (settings.repair_steps * mix + settings.block_steps * whole)
    # The source's layer and the converted one each run over all blocks.
    return whole * (2 * blocks + tried * checks) + mix * fitted + 2 * probe * probed + steps


def _seconds(run: Callable[[], Tensor]) -> float:
    run().flatten()[:1].cpu()  # The first call prepares what later ones need not.
    began = time.monotonic()
    run().flatten()[:1].cpu()  # Devices compute when they are asked.
    return time.monotonic() - began
