"""Choose a rotary table of a model's own: which source frequency each shared rotary pair has, by what text shows."""

from __future__ import annotations

import torch
from torch import Tensor

from uptrain import devices
from uptrain.checkpoint.reader import Checkpoint
from uptrain.methods.bridge import maps_of, position_of
from uptrain.methods.calibrate import Target, read_heads
from uptrain.methods.layered import LayeredModel
from uptrain.methods.mla import choose_slots, rotary_savings
from uptrain.methods.spread import latent_weights


@torch.no_grad()
def slots_by_text(checkpoint: Checkpoint, target: Target, blocks: Tensor, slots: int) -> tuple[int, ...]:
    """Return the source frequency of each of `slots` pairs, from blocks (n, T) int64 run through the source's layers.

    Source: the cost of an unrotated component, summed over layers; see `rotary_savings`.
    """
    model = LayeredModel(checkpoint, target.architecture, target.prefix, devices.device())
    states = list(model.embed(blocks))
    frequencies = torch.tensor(target.frequencies, dtype=torch.float64)
    savings = []
    for index, spec in enumerate(target.before):
        position = position_of(target.architecture, spec)
        if position is None:
            raise ValueError("only rotary keys have slots to choose")
        maps = maps_of(read_heads(checkpoint, target, index))
        with model.layer(index) as layer:
            savings.append(rotary_savings(maps, position, latent_weights(layer, maps, states, frequencies)))
            states = [layer.run(hidden) for hidden in states]
    return choose_slots(savings, slots)
