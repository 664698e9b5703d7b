"""Choose the rotary table of a latent by text: which of the source's rotary pairs each shared pair has."""

from __future__ import annotations

import torch
from torch import Tensor

from uptrain.conversion.calibration.layer_runner import LayerRunner
from uptrain.conversion.calibration.statistics import latent_moments
from uptrain.conversion.calibration.targets import MLATarget
from uptrain.data.boundary import Boundary
from uptrain.methods.head_conversion import maps_of, rotary_of
from uptrain.methods.mla_energy import choose_rope_pairs, rotary_savings
from uptrain.models import devices


@torch.no_grad()
def rope_pairs_by_text(target: MLATarget, blocks: Tensor, boundary: Boundary | None, places: int) -> tuple[int, ...]:
    """Return which of the source's rotary pairs each of `places` shared pairs has.

    - `target`: what the layers become.
    - `blocks`: (n, T) int64, the text that the source's layers run on.
    - `boundary`: the token between documents that are kept apart, None for none.
    - `places`: how many pairs are chosen.

    Source: the cost of an unrotated component, summed over layers; see `rotary_savings`.
    """
    runner = LayerRunner(target.source, devices.device())
    states = list(runner.embed(blocks, boundary))
    inverse_frequencies = torch.tensor(target.inverse_frequencies, dtype=torch.float64)
    savings = []
    for index, spec in enumerate(target.before):
        position = rotary_of(target.source.family.position, spec)
        if position is None:
            raise ValueError("only rotary keys have pairs to choose")
        maps = maps_of(target.read(index))
        with runner.layer(index) as layer:
            weights = latent_moments(layer, maps, enumerate(states), inverse_frequencies).weights(maps)
            savings.append(rotary_savings(maps, position, weights))
            states = [layer.on(block).run(hidden) for block, hidden in enumerate(states)]
    return choose_rope_pairs(savings, places)
