"""Ways to share a layer's heads under a text: exact for heads that are alike, and better the more they may mix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.methods.layers import attention, random_layer
from tests.methods.test_shared_heads import POSITIONS, _commuting
from uptrain.conversion.calibration.head_sharing import share_layer
from uptrain.conversion.calibration.statistics import GroupMoments
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.joint_keys import KeyMoments
from uptrain.methods.joint_values import ValueMoments
from uptrain.methods.rotary import Rotary, to_complex

HIDDEN, DIMS, TOKENS, THETA = 24, 8, 60, 1e4
positions = pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)


@dataclass(frozen=True)
class Text:
    """A text's inputs (T, d), and the layer that reads it."""

    layer: HeadMaps
    position: Rotary | None
    inputs: Tensor

    @property
    def frequencies(self) -> Tensor | None:
        pairs = 0 if self.position is None else self.position.pairs
        return THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs) if pairs else None

    def moments(self, groups: int) -> list[GroupMoments]:
        """Gather each group's moments, token by token, as they are defined."""
        layer, heads = self.layer, self.layer.query_heads // groups
        rows = torch.cat([self.inputs, torch.ones(len(self.inputs), 1, dtype=torch.float64)], dim=1)
        queries, keys, values = (torch.einsum("hnd,td->htn", maps, rows) for maps in (
            layer.q_rows, layer.k_rows, layer.v_rows,
        ))  # fmt: skip
        found = []
        for group in range(groups):
            own = slice(group * layer.kv_heads // groups, (group + 1) * layer.kv_heads // groups)
            stacked = keys[own].transpose(0, 1).flatten(1)
            averaged, asked = [], []
            distances = torch.zeros(heads, TOKENS, dtype=torch.float64)
            received = torch.zeros(TOKENS, dtype=torch.float64)
            for place in range(heads):
                head = group * heads + place
                weights = self.probabilities(queries[head], keys[head // layer.queries_per_kv])
                felt = weights * (1 - weights)
                for distance in range(TOKENS):
                    distances[place, distance] = felt.diagonal(-distance).sum()
                received += felt.sum(0)
                asked.append(queries[head].mT @ (queries[head] * felt.sum(1)[:, None]))
                mixed = weights @ values[own].transpose(0, 1).flatten(1)
                averaged.append(mixed.mT @ mixed)
            places = tuple(place // layer.queries_per_kv for place in range(heads))
            outputs = torch.stack([layer.o[:, group * heads + place].mT @ layer.o[:, group * heads + place]
                                   for place in range(heads)])  # fmt: skip
            second = stacked.mT @ (stacked * received[:, None]) / received.sum()
            found.append(GroupMoments(
                KeyMoments(torch.stack(asked), second, received @ stacked / received.sum(), places),
                ValueMoments(outputs, torch.stack(averaged), places),
                distances,
            ))  # fmt: skip
        return found

    def probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        logits = queries @ keys.mT
        if self.position is not None:
            assert self.frequencies is not None
            phases = torch.exp(1j * self.frequencies[:, None] * torch.arange(TOKENS))
            asked, seen = (to_complex(each.mT, self.position) * phases for each in (queries, keys))
            rest = slice(self.position.dims, None)
            logits = (asked.mH @ seen).real + queries[:, rest] @ keys[:, rest].mT
        mask = torch.full((TOKENS, TOKENS), -torch.inf, dtype=torch.float64).triu(1)
        return torch.softmax(logits / math.sqrt(DIMS) + mask, dim=-1)

    def error(self, layer: HeadMaps) -> float:
        """Return the squared error of the layer's output on this text."""
        wanted = attention(self.layer, self.inputs, self.position, THETA)
        return float((attention(layer, self.inputs, self.position, THETA) - wanted).square().sum())


def text(layer: HeadMaps, position: Rotary | None, seed: int = 0) -> Text:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1, HIDDEN, dtype=torch.float64)
    return Text(layer, position, torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64) * scale + 0.1)


@positions
@pytest.mark.parametrize("groups", [1, 2])
def test_heads_that_are_alike_are_shared_without_loss(position: Rotary | None, groups: int) -> None:
    generator = torch.Generator().manual_seed(1)
    apart, one = random_layer(8, 4, DIMS, HIDDEN, 4), random_layer(8, groups, DIMS, HIDDEN, 3)
    per = 4 // groups
    turns = [_commuting(position, generator) for _ in range(4)]
    mixes = torch.randn(4, DIMS, DIMS, generator=generator, dtype=torch.float64)
    layer = apart.with_rows(
        k_rows=torch.stack([turn @ one.k_rows[head // per] for head, turn in enumerate(turns)]),
        v_rows=torch.stack([mix @ one.v_rows[head // per] for head, mix in enumerate(mixes)]),
    )
    given = text(layer, position)
    found = list(share_layer(layer, groups, position, given.frequencies, given.moments(groups)))
    scale = float(attention(layer, given.inputs, position, THETA).square().sum())
    unseen = text(layer, position, seed=5)
    assert min(unseen.error(each.layer) for each in found) < 1e-12 * scale
    assert max(each.explained["calibrated"].keys for each in found) == pytest.approx(1, abs=1e-9)
    assert all(each.layer.kv_heads == groups for each in found)


@positions
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_no_pooling_explains_more(position: Rotary | None, groups: int, seed: int) -> None:
    layer = random_layer(8, 4, DIMS, HIDDEN, seed, alike=0.2 * seed)
    given = text(layer, position, seed)
    for each in share_layer(layer, groups, position, given.frequencies, given.moments(groups)):
        best = each.explained["calibrated"]
        for other in ("svd", "mean"):
            assert 1 >= best.keys >= each.explained[other].keys - 1e-9
            assert 1 >= best.values >= each.explained[other].values - 1e-9


def test_keys_and_values_that_mix_further_lower_the_layers_error() -> None:
    position = Rotary("half", DIMS)
    totals: dict[int, float] = {}
    for seed in range(6):
        layer = random_layer(4, 4, DIMS, HIDDEN, seed, alike=0.4)
        given = text(layer, position, seed)
        for place, each in enumerate(share_layer(layer, 1, position, given.frequencies, given.moments(1))):
            totals[place] = totals.get(place, 0.0) + given.error(each.layer)
    eigenvectors, *others = totals.values()
    assert min(others) < 0.9 * eigenvectors


@positions
def test_the_same_text_gives_the_same_bytes(position: Rotary | None) -> None:
    layer = random_layer(8, 4, DIMS, HIDDEN, 0)
    given = text(layer, position)
    one, two = (share_layer(layer, 2, position, given.frequencies, given.moments(2)) for _ in range(2))
    for before, after in zip(one, two, strict=True):
        assert torch.equal(before.layer.q, after.layer.q)
        assert torch.equal(before.layer.k, after.layer.k)
        assert torch.equal(before.layer.o, after.layer.o)
