"""Move key/value heads so that similar ones stand side by side, and so share."""

from __future__ import annotations

from uptrain.methods.bridge import maps_of
from uptrain.methods.energy import layer_weights
from uptrain.methods.grouping import similar_order
from uptrain.methods.rotary import Rotary
from uptrain.packing import Heads, LayerHeads


def similar_layer(layer: LayerHeads, groups: int, position: Rotary | None, seed: int) -> tuple[LayerHeads, list[int]]:
    """Return the layer with its key/value heads, their queries and output columns moved so that similar ones share.

    With it comes the order: the number of each of the result's key/value heads in the given layer.

    Values only change place: no bit of them and no logit changes by it.
    """
    maps = maps_of(layer)
    order = similar_order(maps, groups, position, layer_weights(maps, position, None), seed)
    queries = [head * maps.queries_per_kv + i for head in order for i in range(maps.queries_per_kv)]
    picks = {"q": queries, "k": order, "v": order}
    moved = {part: _pick(layer.part(part), pick) for part, pick in picks.items()}
    output = layer.part("o")
    return LayerHeads(**moved, o=Heads(output.weight[:, queries], output.bias)), order


def _pick(heads: Heads, order: list[int]) -> Heads:
    return Heads(heads.weight[order], None if heads.bias is None else heads.bias[order])
