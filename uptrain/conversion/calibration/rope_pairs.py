"""Choose the rotary table of a latent by text: which of the source's rotary pairs each shared pair has."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from uptrain.conversion.calibration.layer_runner import LayerRunner
from uptrain.conversion.calibration.statistics import latent_moments
from uptrain.conversion.calibration.targets import MLATarget
from uptrain.data.boundary import Boundary
from uptrain.methods.head_conversion import maps_of, rotary_of
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.mla_calibrated import cost_of_pairs
from uptrain.methods.mla_energy import LatentMoments, choose_rope_pairs, rotary_savings
from uptrain.methods.rotary import Rotary
from uptrain.models import devices


@torch.no_grad()
def rope_pairs_by_text(target: MLATarget, blocks: Tensor, boundary: Boundary | None, places: int) -> tuple[int, ...]:
    """Return which of the source's rotary pairs each of `places` shared pairs has.

    The source's layers run on the text: once to find the pairs that cost most when each is for itself, and once more
    to compare them with the fastest pairs, when pairs are mixed as the fit of a latent mixes them.

    - `target`: what the layers become.
    - `blocks`: (n, T) int64, the text that the source's layers run on.
    - `boundary`: the token between documents that are kept apart, None for none.
    - `places`: how many pairs are chosen.

    Source: the cost of an unrotated component, summed over layers; see `rotary_savings` and `cost_of_pairs`.
    """
    apart = choose_rope_pairs(
        [rotary_savings(maps, of, got.weights(maps)) for maps, of, got in _layers(target, blocks, boundary)], places
    )
    fastest = tuple(range(min(places, len(target.inverse_frequencies))))
    if len(fastest) < places or apart == fastest:
        return apart
    costs = {apart: 0.0, fastest: 0.0}
    for maps, position, moments in _layers(target, blocks, boundary):
        for pairs in costs:
            costs[pairs] += cost_of_pairs(maps, pairs, position, moments)
    return min(costs, key=costs.__getitem__)


def _layers(
    target: MLATarget, blocks: Tensor, boundary: Boundary | None
) -> Iterator[tuple[HeadMaps, Rotary, LatentMoments]]:
    """Yield each layer of the source, how it rotates, and its moments on blocks."""
    runner = LayerRunner(target.source, devices.device())
    states = list(runner.embed(blocks, boundary))
    inverse_frequencies = torch.tensor(target.inverse_frequencies, dtype=torch.float64)
    for index, spec in enumerate(target.before):
        position = rotary_of(target.source.family.position, spec)
        if position is None:
            raise ValueError("only rotary keys have pairs to choose")
        maps = maps_of(target.read(index))
        with runner.layer(index) as layer:
            yield maps, position, latent_moments(layer, maps, enumerate(states), inverse_frequencies)
            states = [layer.on(block).run(hidden) for block, hidden in enumerate(states)]
