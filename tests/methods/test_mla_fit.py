"""The joint fit of a rotary key and a latent: its error counted pair by pair, and steps that are the best ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.methods.layers import random_layer
from uptrain.architectures.mla_rope import MLARope
from uptrain.methods import mla_fit
from uptrain.methods.energy import output_energy
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.mla import LatentShape
from uptrain.methods.mla_calibrated import cost_of_pairs, fitted_latents
from uptrain.methods.mla_energy import LatentMoments
from uptrain.methods.mla_fit import RotaryFit, RotaryProblem
from uptrain.methods.mla_latent import LatentFit, Side
from uptrain.methods.mla_layer import Angles, mix_heads
from uptrain.methods.rotary import Rotary

DIMS, HIDDEN, TOKENS = 8, 7, 5
LAYOUTS = {"half": Rotary("half", DIMS), "interleaved": Rotary("interleaved", DIMS)}
FREQUENCIES = torch.tensor([1.0, 0.4, 0.2, 0.1], dtype=torch.float64)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(biases: bool = True, seed: int = 0) -> tuple[HeadMaps, torch.Tensor, torch.Tensor, LatentMoments]:
    """Return a layer, queries (H, n, D), inputs x̃ (n, d̃) and the moments of both."""
    layer = random_layer(4, 2, DIMS, HIDDEN, seed, biases)
    queries, rows = draw(seed + 1, 4, 6, DIMS), torch.cat([draw(seed + 2, 30, HIDDEN) + 0.5, torch.ones(30, 1)], 1)
    averaged = torch.cat([draw(seed + 3, 30, HIDDEN), torch.ones(30, 1)], 1)
    moments = LatentMoments(
        queries=queries.mT @ queries / 6,
        keys=3 * rows.mT @ rows,
        values=averaged.mT @ averaged,
        distances=draw(seed + 4, 4, TOKENS).square(),
        inverse_frequencies=FREQUENCIES,
    )
    return layer, queries, rows, moments


def turn(rows: torch.Tensor, position: Rotary, frequencies: torch.Tensor, distance: int) -> torch.Tensor:
    """Rotate (…, D) as a query `distance` tokens later sees it, pair by pair."""
    result = rows.clone()
    for real, imaginary, speed in zip(*position.indices(), frequencies, strict=True):
        cos, sin = torch.cos(speed * distance), torch.sin(speed * distance)
        result[..., real] = rows[..., real] * cos + rows[..., imaginary] * sin
        result[..., imaginary] = rows[..., imaginary] * cos - rows[..., real] * sin
    return result


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("position", LAYOUTS.values(), ids=LAYOUTS)
def test_the_loss_is_that_of_every_query_key_and_distance(position, biases, monkeypatch):
    monkeypatch.setattr(mla_fit, "DAMPING", 0.0)
    layer, queries, rows, moments = sample(biases)
    pairs = (0, 2)
    problem = RotaryProblem(layer, pairs, position, moments)
    values = Side(layer.v_rows[..., : None if biases else -1], output_energy(layer))
    key, factors = problem.rotary(draw(8, 4, HIDDEN + biases))
    fit, _ = problem.fit(key, factors, 3, 1.0)
    shown = rows if biases else rows[:, :-1]
    rotary, grid, shares = shown @ fit.key.mT, Rotary("interleaved", 4), moments.distances
    expected = 0.0
    for head in range(4):
        keys = rows @ layer.k_rows[head // 2].mT
        unrotated = shown @ fit.latent.down.mT @ fit.latent.k_ups[head].mT
        query = queries[head]
        ordered = query[:, problem.order]
        wrong = torch.stack(
            [
                query @ turn(keys, position, FREQUENCIES, distance).mT
                - (ordered @ fit.factors[head]) @ turn(rotary, grid, FREQUENCIES[list(pairs)], distance).mT
                - ordered @ unrotated.mT
                for distance in range(TOKENS)
            ]
        )
        weights = (shares[head] / shares[head].sum())[:, None, None] / len(rows)
        row_means = (weights * wrong).sum((0, 2))
        expected += float(((weights * wrong.square()).sum((0, 2)) - row_means.square()).mean())
    found, _ = problem.lost(fit, values)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("biases", [False, True])
def test_each_step_finds_what_no_small_change_betters(biases):
    layer, _, _, moments = sample(biases)
    problem = RotaryProblem(layer, (0, 2), LAYOUTS["half"], moments)
    values = Side(layer.v_rows[..., : None if biases else -1], output_energy(layer))
    key, factors = problem.rotary(draw(8, 4, HIDDEN + biases))
    fit, _ = problem.fit(key, factors, 3, 1.0)

    def lost(**changes: torch.Tensor) -> float:
        return sum(problem.lost(replace(fit, **changes), values))

    best_key, best_factors = problem.fit_key(fit.factors, fit.latent), problem.fit_factors(fit.key, fit.latent)
    assert lost(key=best_key) <= lost() + 1e-12
    assert lost(factors=best_factors) <= lost() + 1e-12
    for seed in range(5):
        assert lost(key=best_key + 0.01 * draw(seed, *best_key.shape)) > lost(key=best_key)
        assert lost(factors=best_factors + 0.01 * draw(seed, *factors.shape)) > lost(factors=best_factors)


@pytest.mark.parametrize("seed", range(3))
def test_rounds_never_raise_the_loss(seed):
    layer, _, _, moments = sample(seed=seed)
    problem, values = RotaryProblem(layer, (0, 1), LAYOUTS["half"], moments), Side(layer.v_rows, output_energy(layer))
    key, factors = draw(8, 4, HIDDEN + 1), draw(9, 4, DIMS, 4)
    fit = RotaryFit(key, factors, LatentFit(draw(1, 4, HIDDEN + 1), draw(2, 4, DIMS, 4), draw(3, 2, DIMS, 4)))
    losses = [sum(problem.lost(fit, values))]
    # Round by round: `fit` ends before a round that gains nothing, and would hide one that loses.
    for _ in range(8):
        fit = problem._round(fit, values)
        losses.append(sum(problem.lost(fit, values)))
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[1]


def test_pairs_of_one_frequency_share_the_rotary_key_as_plain_dims_would():
    layer, _, _, moments = sample(biases=False)
    # All four pairs turn alike, and hold two complex numbers only.
    keys = layer.k.clone()
    keys[:, 2:4], keys[:, 6:8] = 0.5 * keys[:, 0:2], 0.5 * keys[:, 4:6]
    keys[1] = keys[0]
    layer, moments = replace(layer, k=keys), replace(moments, inverse_frequencies=torch.full((4,), 0.3).double())
    shape = LatentShape(MLARope.DECOUPLED, 2 * DIMS, (0, 1))
    [(maps, kept)] = fitted_latents(layer, shape, LAYOUTS["half"], moments, (1.0,))
    assert kept.keys > 1 - 1e-6
    x = draw(5, 12, HIDDEN)
    found = (
        mix_heads(maps, x, Angles.at(torch.full((2,), 0.3), torch.arange(12)), None, DIMS**-0.5) @ maps.o.flatten(1).mT
    )
    alike = attention_of(layer, x)
    torch.testing.assert_close(found, alike, rtol=1e-3, atol=1e-4)


def attention_of(layer: HeadMaps, x: torch.Tensor) -> torch.Tensor:
    """Attend with every pair at the same frequency."""
    every = LatentShape(MLARope.DECOUPLED, 2 * DIMS, tuple(pair for pair in range(4) for _ in range(2)), nope=False)
    _, _, _, moments = sample(biases=False)
    moments = replace(moments, inverse_frequencies=torch.full((4,), 0.3).double())
    [(maps, _)] = fitted_latents(layer, every, LAYOUTS["half"], moments, (1.0,))
    return (
        mix_heads(maps, x, Angles.at(torch.full((8,), 0.3), torch.arange(12)), None, DIMS**-0.5) @ maps.o.flatten(1).mT
    )


def test_a_fit_without_frequencies_is_refused():
    layer, _, _, moments = sample()
    with pytest.raises(ValueError, match="rotary"):
        RotaryProblem(layer, (0,), LAYOUTS["half"], replace(moments, inverse_frequencies=None))


def test_the_cost_of_pairs_counts_the_rest_by_what_the_latent_loses_of_it(monkeypatch):
    layer, _, _, moments = sample()
    problem = RotaryProblem(layer, (0, 2), LAYOUTS["half"], moments)
    values = Side(layer.v_rows, output_energy(layer))
    key, factors = problem.rotary(draw(8, 4, HIDDEN + 1))
    fit, explained = problem.fit(key, factors, 3, 1.0)
    total = problem.lost(fit, values)[0] / (1 - explained.keys)
    nothing = replace(fit.latent, k_ups=fit.latent.k_ups * 0)
    monkeypatch.setattr(mla_fit, "LATENT_SHARE", 1.0)
    expected = problem.lost(replace(fit, latent=nothing), values)[0] / total
    assert problem.cost(fit.key, fit.factors) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(mla_fit, "LATENT_SHARE", 0.0)
    assert problem.cost(fit.key, fit.factors) <= (1 - explained.keys) * (1 + 1e-9)


def test_pairs_that_turn_alike_cost_less_than_pairs_that_do_not():
    layer, _, _, moments = sample()
    moments = replace(moments, inverse_frequencies=torch.tensor([1.0, 0.99, 1e-6, 1e-7], dtype=torch.float64))
    costs = {pairs: cost_of_pairs(layer, pairs, LAYOUTS["half"], moments) for pairs in ((0, 1), (2, 3))}
    assert costs[0, 1] < 0.5 * costs[2, 3]
