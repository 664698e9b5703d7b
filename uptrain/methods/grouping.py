"""Which key/value heads share: neighbours, as in the paper, or the partition that loses least."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from uptrain.architectures.projections import Heads, LayerHeads
from uptrain.methods.energy import LayerWeights, layer_weights
from uptrain.methods.head_conversion import maps_of
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import gram, matrix_root
from uptrain.methods.rotary import Rotary, to_complex

EXACT_HEADS = 12
"""Heads up to which every partition is compared (4096 sets of placed heads); above, a local search."""

RESTARTS = 4
"""Starting points of the local search: the contiguous partition and random ones."""

Cost = Callable[[tuple[int, ...]], float]
"""Returns the energy that a group of heads loses, as a share."""


def similar_order(
    layer: HeadMaps, groups: int, position: Rotary | None, weights: LayerWeights, seed: int = 0
) -> list[int]:
    """Return an order of the key/value heads whose runs of G₀/G lose the least weighted energy when factored.

    Keys and values each count as a share of their own total. The order is exact up to `EXACT_HEADS` heads. Above, it is
    found by swaps from seeded starts, and never worse than contiguous. `move_heads` applies it.

    - `layer`: the layer's projections by head, float64.
    - `groups`: how many groups the heads form.
    - `position`: which key dims are rotated, None where keys see no rotation.
    - `weights`: how much errors count.
    - `seed`: the seed of the starts.
    """
    return [
        head
        for group in best_partition(layer.kv_heads, groups, _cost(layer, position, weights), seed)
        for head in group
    ]


def best_partition(heads: int, groups: int, cost: Cost, seed: int = 0) -> list[tuple[int, ...]]:
    """Partition heads into equal groups of least total cost; the groups are ordered by their first head.

    - `heads`: how many heads there are.
    - `groups`: how many groups they form.
    - `cost`: the cost of one group.
    - `seed`: the seed of the local search.
    """
    size = heads // groups
    known = cache(cost)
    if heads <= EXACT_HEADS:
        return _exact(heads, size, known)
    return _local(heads, size, known, seed)


def _exact(heads: int, size: int, cost: Cost) -> list[tuple[int, ...]]:
    """Solve by dynamic programming over the sets of heads that are placed, lowest free head first."""

    @cache
    def best(free: tuple[int, ...]) -> tuple[float, tuple[tuple[int, ...], ...]]:
        if not free:
            return 0.0, ()
        found: tuple[float, tuple[tuple[int, ...], ...]] | None = None
        for others in combinations(free[1:], size - 1):
            group = (free[0], *others)
            rest, tail = best(tuple(head for head in free if head not in group))
            total = cost(group) + rest
            if found is None or total < found[0] - 1e-12 * abs(found[0]):
                found = total, (group, *tail)
        assert found is not None
        return found

    return list(best(tuple(range(heads)))[1])


def _local(heads: int, size: int, cost: Cost, seed: int) -> list[tuple[int, ...]]:
    """Swap two heads of different groups while that lowers the cost, from the contiguous and random partitions."""
    generator = random.Random(seed)
    results = []
    for start in range(RESTARTS):
        order = list(range(heads))
        if start:
            generator.shuffle(order)
        partition = [tuple(sorted(order[i : i + size])) for i in range(0, heads, size)]
        while (better := _best_swap(partition, cost)) is not None:
            partition = better
        results.append((sum(map(cost, partition)), sorted(partition)))
    return min(results)[1]


def _best_swap(partition: list[tuple[int, ...]], cost: Cost) -> list[tuple[int, ...]] | None:
    """Return the partition after the first swap that lowers the cost, None where no swap does."""
    for i, j in combinations(range(len(partition)), 2):
        before = cost(partition[i]) + cost(partition[j])
        for a in partition[i]:
            for b in partition[j]:
                left = tuple(sorted((*(head for head in partition[i] if head != a), b)))
                right = tuple(sorted((*(head for head in partition[j] if head != b), a)))
                if cost(left) + cost(right) < before * (1 - 1e-9):
                    return [left if n == i else right if n == j else group for n, group in enumerate(partition)]
    return None


def _cost(layer: HeadMaps, position: Rotary | None, weights: LayerWeights) -> Cost:
    """Return the cost of a group: its lost shares of key and value energy. All heads' Gram matrices are made once."""
    rotated = 0 if position is None else position.dims
    stacks = [_weighted(layer.v_rows, weights.values)]
    keys = layer.k_rows
    if rotated < keys.shape[1]:
        rest = slice(rotated, None)
        stacks.append(_weighted(keys[:, rest], weights.keys[:, rest, rest]))
    grams = [gram(stack.flatten(0, 1), weights.second_moment) for stack in stacks]
    per_pair: Tensor | None = None
    if position is not None:
        real, _ = position.indices()
        pairs = to_complex(keys, position) * weights.keys[:, real, real].clamp(min=0).sqrt()[..., None]
        per_pair = torch.stack([gram(pairs[:, pair], weights.second_moment) for pair in range(position.pairs)])
    key_total = sum(float(g.trace()) for g in grams[1:])
    if per_pair is not None:
        key_total += float(per_pair.diagonal(dim1=-2, dim2=-1).real.sum())
    totals = [float(grams[0].trace()), *[key_total] * (len(grams) - 1)]

    def cost(group: tuple[int, ...]) -> float:
        lost = 0.0
        for matrix, total, stack in zip(grams, totals, stacks, strict=True):
            dims = stack.shape[1]
            rows = (torch.tensor(group)[:, None] * dims + torch.arange(dims)).flatten()
            values = torch.linalg.eigvalsh(matrix[rows[:, None], rows])
            lost += float(values[:-dims].clamp(min=0).sum()) / total if total > 0 else 0.0
        if per_pair is not None and key_total > 0:
            index = torch.tensor(group)
            values = torch.linalg.eigvalsh(per_pair[:, index[:, None], index])
            lost += float(values[:, :-1].clamp(min=0).sum()) / key_total
        return lost

    return cost


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([matrix_root(weight) @ block for weight, block in zip(weights, rows, strict=True)])


def similar_layer(layer: LayerHeads, groups: int, position: Rotary | None, seed: int) -> tuple[LayerHeads, list[int]]:
    """Return the layer with its heads moved so that similar ones share, and their order.

    The order lists, for each key/value head of the result, its number in the given layer. Values only change place: no
    bit of them and no logit changes.

    - `layer`: the layer's heads.
    - `groups`: how many groups the heads form.
    - `position`: which key dims are rotated, None where keys see no rotation.
    - `seed`: the seed of the local search.
    """
    maps = maps_of(layer)
    order = similar_order(maps, groups, position, layer_weights(maps, position, None), seed)
    return move_heads(layer, order), order


def move_heads(layer: LayerHeads, order: list[int]) -> LayerHeads:
    """Put the key/value heads in `order`, taking their query heads and output columns along; no logit changes."""
    per = len(layer.part("q").weight) // len(layer.part("k").weight)
    queries = [head * per + i for head in order for i in range(per)]
    picks = {"q": queries, "k": order, "v": order}
    moved = {part: _pick(layer.part(part), pick) for part, pick in picks.items()}
    output = layer.part("o")
    return LayerHeads(**moved, o=Heads(output.weight[:, queries], output.bias))


def _pick(heads: Heads, order: list[int]) -> Heads:
    return Heads(heads.weight[order], None if heads.bias is None else heads.bias[order])
