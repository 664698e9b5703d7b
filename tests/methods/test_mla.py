"""Latents against a literal attention: exact where they can be, and honest about what they lose where not."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.layers import attention, random_layer, random_moment
from uptrain.architectures.mla_rope import MLARope
from uptrain.conversion.calibration.statistics import by_distance
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.mla import LatentShape, factor_latent
from uptrain.methods.mla_energy import (
    LatentWeights,
    choose_rope_pairs,
    mean_rotation,
    plain_weights,
    rotary_savings,
)
from uptrain.methods.mla_layer import Angles, LatentMaps, mix_heads
from uptrain.methods.rotary import Rotary

THETA = 100.0
LAYOUTS = {"half": Rotary("half", 8), "interleaved": Rotary("interleaved", 8)}


def speeds(position: Rotary) -> torch.Tensor:
    return THETA ** (-torch.arange(position.pairs, dtype=torch.float64) / position.pairs)


def attend(maps: LatentMaps, x: torch.Tensor, frequencies: torch.Tensor, dims: int) -> torch.Tensor:
    mixed = mix_heads(maps, x, Angles.at(frequencies, torch.arange(len(x))), None, 1 / math.sqrt(dims))
    return mixed @ maps.o.flatten(1).mT


def weights_of(layer: HeadMaps, position: Rotary | None, calibrated: bool) -> LatentWeights:
    plain = plain_weights(layer, None if position is None else speeds(position))
    if not calibrated:
        return plain
    hidden = layer.q.shape[2]
    roots = torch.randn(layer.query_heads, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return LatentWeights(roots @ roots.mT, plain.outputs, random_moment(hidden, 0), plain.mean_rotation)


def inputs(hidden: int, tokens: int = 12) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_latent_as_wide_as_the_input_is_exact_without_rotation(kv_heads, calibrated):
    layer, x = random_layer(4, kv_heads, 8, 15, 0), inputs(15)
    maps, kept = factor_latent(layer, LatentShape(MLARope.NONE, 16), None, weights_of(layer, None, calibrated))
    assert maps.down.shape == (16, 15)
    torch.testing.assert_close(attention(maps.expanded(), x, None), attention(layer, x, None), rtol=1e-7, atol=1e-9)
    assert kept.keys > 1 - 1e-9
    assert kept.values > 1 - 1e-9


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("position", LAYOUTS.values(), ids=LAYOUTS)
def test_every_component_in_the_rotary_key_is_exact(position, kv_heads, calibrated):
    layer, x = random_layer(4, kv_heads, 8, 15, 0), inputs(15)
    pairs = tuple(pair for pair in range(4) for _ in range(kv_heads))
    shape = LatentShape(MLARope.DECOUPLED, kv_heads * 8, pairs, nope=False)
    maps, _ = factor_latent(layer, shape, position, weights_of(layer, position, calibrated))
    assert maps.q_nope.shape[1] == maps.k_up.shape[1] == 0
    found = attend(maps, x, speeds(position)[list(pairs)], 8)
    torch.testing.assert_close(found, attention(layer, x, position, THETA), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("position", LAYOUTS.values(), ids=LAYOUTS)
def test_a_single_head_fits_the_plain_grid_exactly_whatever_else_the_latent_could_hold(position):
    layer, x = random_layer(4, 1, 8, 15, 0), inputs(15)
    shape = LatentShape(MLARope.DECOUPLED, 8, (0, 1, 2, 3))
    maps, kept = factor_latent(layer, shape, position, weights_of(layer, position, True))
    found = attend(maps, x, speeds(position), 8)
    torch.testing.assert_close(found, attention(layer, x, position, THETA), rtol=1e-7, atol=1e-9)
    assert kept.keys > 1 - 1e-9


@pytest.mark.parametrize("position", LAYOUTS.values(), ids=LAYOUTS)
def test_a_latent_rotated_on_reading_loses_nothing_to_rotation(position):
    layer, x = random_layer(4, 4, 8, 15, 0), inputs(15)
    maps, _ = factor_latent(layer, LatentShape(MLARope.PRE_ROPE, 16), position, weights_of(layer, position, True))
    wanted = attention(layer, x, position, THETA)
    torch.testing.assert_close(attention(maps.expanded(), x, position, THETA), wanted, rtol=1e-7, atol=1e-9)


def test_unrotated_pairs_are_exact_where_attention_looks_no_further_than_itself():
    position = LAYOUTS["half"]
    layer = random_layer(4, 2, 8, 15, 0)
    distances = torch.zeros(4, 12, dtype=torch.float64)
    distances[:, 0] = 1
    weights = weights_of(layer, position, False)
    weights = LatentWeights(weights.queries, weights.outputs, None, mean_rotation(speeds(position), distances))
    maps, kept = factor_latent(layer, LatentShape(MLARope.DECOUPLED, 16, (0,)), position, weights)
    assert kept.keys > 1 - 1e-9
    x = inputs(15, tokens=1)
    found = attend(maps, x, speeds(position)[:1], 8)
    torch.testing.assert_close(found, attention(layer, x, position, THETA), rtol=1e-7, atol=1e-9)


@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_wider_latent_never_keeps_less(seed, kv_heads, biases, calibrated):
    layer = random_layer(4, kv_heads, 8, 15, seed, biases)
    weights = weights_of(layer, None, calibrated)
    kept = [factor_latent(layer, LatentShape(MLARope.NONE, rank), None, weights, 1.0)[1] for rank in (2, 5, 9, 16)]
    totals = [share.keys + share.values for share in kept]
    assert all(after > before - 1e-9 for before, after in pairwise(totals))


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_slot_saves_what_leaving_the_component_unrotated_costs(seed):
    position = LAYOUTS["half"]
    layer = random_layer(4, 2, 8, 15, seed)
    weights = weights_of(layer, position, True)
    savings = rotary_savings(layer, position, weights)
    kept = factor_latent(layer, LatentShape(MLARope.DECOUPLED, 32), position, weights)[1]
    assert math.isclose(1 - kept.keys, float(savings.sum()), rel_tol=1e-6)


def test_slots_go_to_the_frequencies_that_cost_most_over_all_layers():
    one = torch.tensor([[5.0, 4.0], [3.0, 0.1], [0.2, 0.0]])
    two = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 0.0]])
    assert choose_rope_pairs([one], 3) == (0, 0, 1)
    assert choose_rope_pairs([one, two], 3) == (0, 1, 2)
    assert choose_rope_pairs([one, two], 6) == (0, 0, 1, 1, 2, 2)


def test_the_mean_rotation_is_what_best_stands_in_for_a_rotation():
    frequencies = torch.tensor([0.7], dtype=torch.float64)
    shares = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    rho = mean_rotation(frequencies, shares)[0, 0]
    turns = torch.exp(-0.7j * torch.arange(3, dtype=torch.float64))

    def error(value: torch.Tensor) -> float:
        return float((shares[0] * (turns - value).abs().square()).sum())

    assert math.isclose(error(rho), 1 - float(rho.abs()) ** 2, rel_tol=1e-9)
    assert all(error(rho) < error(rho + step) for step in (0.01, -0.01, 0.01j, -0.01j))


def test_weights_by_distance_are_sums_along_diagonals():
    weights = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([weights.diagonal(-distance, 1, 2).sum(-1) for distance in range(5)], dim=1)
    torch.testing.assert_close(by_distance(weights), expected)
    parts = [by_distance(weights[:, rows], rows.start) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(parts), expected)
