"""The statistics of a layer are the sums that they are said to be, whichever order of products is the cheaper one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods.layers import random_layer
from uptrain.conversion.calibration import statistics
from uptrain.conversion.calibration.statistics import AveragedMoment, gather_moments, value_moments
from uptrain.methods.shared_heads import DAMPING


@given(
    heads=st.integers(1, 4),
    tokens=st.integers(1, 12),
    width=st.integers(1, 40),
    part=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_it_is_the_sum_over_heads_and_queries(heads: int, tokens: int, width: int, part: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(heads, tokens, tokens, generator=generator).tril()
    probabilities /= probabilities.sum(-1, keepdim=True)
    rows = torch.randn(tokens, width, generator=generator)
    expected = np.zeros((width, width))
    for head in probabilities.double().numpy():
        for query in head:
            average = query @ rows.double().numpy()
            expected += np.outer(average, average)
    averaged = AveragedMoment(rows, heads)
    for start in range(0, tokens, part):
        averaged.add(probabilities[:, start : start + part, : start + part])
    np.testing.assert_allclose(averaged.moment().numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "groups"), [(4, 2, 1), (4, 4, 2), (6, 2, 2)])
def test_a_groups_moments_are_sums_over_its_heads_and_tokens(
    heads: int, kv_heads: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps, blocks = random_layer(heads, kv_heads, 4, 12, 0), torch.randn(2, 9, 12)
    weights = torch.rand(2, heads, 9, 9, generator=torch.Generator().manual_seed(1)).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    layer = Layer(weights)
    found = gather_moments(layer, maps, {}, groups, enumerate(blocks))  # type: ignore[arg-type]
    monkeypatch.setattr(statistics, "VALUE_SQUARES", 0)
    together = gather_moments(layer, maps, {}, groups, enumerate(blocks))  # type: ignore[arg-type]
    rows = torch.cat([blocks, torch.ones(2, 9, 1)], dim=2).double()
    felt = (weights * (1 - weights)).double()
    per, stacked = heads // groups, kv_heads // groups
    for group, moments in enumerate(found):
        own, read = slice(group * per, (group + 1) * per), slice(group * stacked, (group + 1) * stacked)
        keys, values = (rows @ each[read].flatten(0, 1).mT for each in (maps.k_rows, maps.v_rows))
        received = felt[:, own].sum((1, 2))
        moment = torch.einsum("bt,bti,btj->ij", received, keys, keys) / received.sum()
        noise = maps.k_rows[read].flatten(0, 1) @ maps.k_rows[read].flatten(0, 1).mT
        expected = moment + DAMPING * moment.trace() / noise.trace() * noise
        torch.testing.assert_close(moments.keys.keys, expected, rtol=1e-5, atol=1e-6)
        mean = torch.einsum("bt,bti->i", received, keys) / received.sum()
        torch.testing.assert_close(moments.keys.mean, mean, rtol=1e-5, atol=1e-6)
        averages = torch.einsum("bhts,bsi->bhti", weights[:, own].double(), values)
        noise = maps.v_rows[read].flatten(0, 1) @ maps.v_rows[read].flatten(0, 1).mT
        for head in range(per):
            asked = torch.einsum("btd,nd->btn", rows, maps.q_rows[group * per + head])
            given = felt[:, group * per + head].sum(2)
            expected = torch.einsum("bt,bti,btj->ij", given, asked, asked) / 4 / 18
            torch.testing.assert_close(moments.keys.queries[head], expected, rtol=1e-5, atol=1e-6)
            moment = torch.einsum("bti,btj->ij", averages[:, head], averages[:, head])
            expected = moment + DAMPING * moment.trace() / noise.trace() * noise
            torch.testing.assert_close(moments.values.values[head], expected, rtol=1e-5, atol=1e-5)
            for distance in range(9):
                expected = felt[:, group * per + head].diagonal(-distance, 1, 2).sum()
                torch.testing.assert_close(moments.distances[head, distance], expected, rtol=1e-5, atol=1e-6)
        total = moments.values.values.sum(0, keepdim=True)
        torch.testing.assert_close(together[group].values.values, total, rtol=1e-5, atol=1e-5)
        assert moments.keys.heads == tuple(head * stacked // per for head in range(per))


class Layer:
    """Stands for a layer with given probabilities (blocks, H, T, T), which come a few queries at a time."""

    def __init__(self, weights: torch.Tensor, number: int = 0) -> None:
        self._weights, self._number = weights, number

    def on(self, number: int) -> Layer:
        return Layer(self._weights, number)

    def attention_weights(self, hidden: torch.Tensor, _: object) -> tuple[torch.Tensor, object]:
        parts = self._weights[self._number].split(4, dim=1)
        return hidden, iter([part[..., : 4 * (place + 1)].clone() for place, part in enumerate(parts)])


@pytest.mark.parametrize(("heads", "kv_heads", "groups", "count"), [(9, 3, 1, 9), (32, 32, 1, 4), (32, 32, 8, 4)])
def test_value_moments_take_bounded_room(heads: int, kv_heads: int, groups: int, count: int) -> None:
    maps = random_layer(heads, kv_heads, 4, 4 * heads, 0)
    found = value_moments(maps, groups)
    assert found == count
    width = kv_heads // groups * 4
    assert found == 1 or groups * found * width**2 <= statistics.VALUE_SQUARES * (4 * heads) ** 2
