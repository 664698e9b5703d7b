"""Choose a rotary table of a model's own: which source frequency each shared rotary pair has, by what text shows."""

from __future__ import annotations

import torch
from torch import Tensor

from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.calibration.engine import Target, read_heads
from uptrain.conversion.calibration.layer_runner import LayeredModel
from uptrain.conversion.calibration.statistics import latent_weights
from uptrain.methods.head_conversion import maps_of, rotary_of
from uptrain.methods.mla_energy import choose_rope_pairs, rotary_savings
from uptrain.models import devices


@torch.no_grad()
def slots_by_text(checkpoint: Checkpoint, target: Target, blocks: Tensor, slots: int) -> tuple[int, ...]:
    """Return the source frequency of each of `slots` pairs, from blocks (n, T) int64 run through the source's layers.

    Source: the cost of an unrotated component, summed over layers; see `rotary_savings`.
    """
    model = LayeredModel(target.source, devices.device())
    states = list(model.embed(blocks))
    frequencies = torch.tensor(target.frequencies, dtype=torch.float64)
    savings = []
    for index, spec in enumerate(target.before):
        position = rotary_of(target.source.family.position, spec)
        if position is None:
            raise ValueError("only rotary keys have slots to choose")
        maps = maps_of(read_heads(checkpoint, target, index))
        with model.layer(index) as layer:
            savings.append(rotary_savings(maps, position, latent_weights(layer, maps, states, frequencies)))
            states = [layer.run(hidden) for hidden in states]
    return choose_rope_pairs(savings, slots)
