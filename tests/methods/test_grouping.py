from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.layers import attention, random_layer, random_moment, reorder
from uptrain.methods.energy import layer_weights
from uptrain.methods.grouping import best_partition, similar_order
from uptrain.methods.rotary import Rotary
from uptrain.methods.shared_heads import factor_heads

POSITIONS = {"free": None, "half": Rotary("half", 8), "partial": Rotary("interleaved", 4)}


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
@given(order=st.permutations(range(4)), seed=st.integers(0, 99), biases=st.booleans())
@settings(max_examples=15, deadline=None)
def test_reordering_heads_changes_no_output(position, order, seed, biases):
    layer = random_layer(8, 4, 8, 16, seed, biases)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = reorder(layer, list(order))
    torch.testing.assert_close(attention(moved, x, position), attention(layer, x, position), rtol=1e-10, atol=1e-10)


@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(6, 3), (6, 2), (8, 4), (4, 1), (4, 4)]))
@settings(max_examples=40, deadline=None)
def test_small_partitions_are_optimal(seed, shape):
    heads, groups = shape
    cost = random_cost(heads, seed)
    size = heads // groups
    brute = (
        min(
            sum(cost(tuple(sorted(order[i : i + size]))) for i in range(0, heads, size))
            for order in permutations(range(heads))
            if order[0] == 0
        )
        if heads <= 6
        else None
    )
    found = best_partition(heads, groups, cost)
    assert sorted(head for group in found for head in group) == list(range(heads))
    assert {len(group) for group in found} == {size}
    if brute is not None:
        assert sum(map(cost, found)) == pytest.approx(brute)


@given(seed=st.integers(0, 1000), shape=st.sampled_from([(16, 4), (14, 7), (18, 2)]))
@settings(max_examples=20, deadline=None)
def test_the_local_search_repeats_and_is_never_worse_than_neighbours(seed, shape):
    heads, groups = shape
    cost = random_cost(heads, seed)
    size = heads // groups
    found = best_partition(heads, groups, cost, seed)
    assert found == best_partition(heads, groups, cost, seed)
    assert sorted(head for group in found for head in group) == list(range(heads))
    neighbours = [tuple(range(i, i + size)) for i in range(0, heads, size)]
    assert sum(map(cost, found)) <= sum(map(cost, neighbours)) + 1e-12


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
def test_planted_twins_are_found_and_merge_without_loss(position):
    layer = random_layer(4, 4, 8, 24, 1)
    twins = [0, 1, 0, 1]
    layer = layer.with_rows(k_rows=layer.k_rows[twins], v_rows=layer.v_rows[twins])
    moment = random_moment(24, 1)
    order = similar_order(layer, 2, position, layer_weights(layer, position, moment))
    assert order == [0, 2, 1, 3]
    kept = factor_heads(reorder(layer, order), 2, position, moment).explained["calibrated"]
    assert kept.keys == pytest.approx(1)
    assert kept.values == pytest.approx(1)


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("calibrated", [True, False])
def test_similar_never_keeps_less_than_contiguous(position, calibrated):
    for seed in range(5):
        layer = random_layer(8, 8, 8, 16, seed)
        moment = random_moment(16, seed) if calibrated else None
        name = "calibrated" if calibrated else "svd"
        order = similar_order(layer, 4, position, layer_weights(layer, position, moment))
        before = factor_heads(layer, 4, position, moment, damping=0).explained[name]
        after = factor_heads(reorder(layer, order), 4, position, moment, damping=0).explained[name]
        assert after.keys + after.values >= before.keys + before.values - 1e-9


def random_cost(heads, seed):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.rand(heads, heads, generator=generator, dtype=torch.float64)
    pair = pair + pair.T
    return lambda group: float(pair[list(group)][:, list(group)].triu(1).sum())
