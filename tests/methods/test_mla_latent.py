"""One latent for two moments: each closed form against the equations it solves, and rounds that never lose."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.methods.layers import random_moment
from uptrain.methods.mla_latent import LatentFit, Side, TwoMoments, alternate

WIDTH, RANK = 11, 5


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(seed: int, count: int, size: int) -> torch.Tensor:
    roots = draw(seed, count, size, size)
    return roots @ roots.mT


def problem(seed: int) -> tuple[TwoMoments, Side, Side]:
    keys = Side(draw(seed, 3, 4, WIDTH), positive(seed + 1, 3, 4))
    values = Side(draw(seed + 2, 2, 3, WIDTH), positive(seed + 3, 2, 3))
    return TwoMoments.of(random_moment(WIDTH - 1, seed), random_moment(WIDTH - 1, seed + 9)), keys, values


def lost(moments: TwoMoments, fit: LatentFit, keys: Side, values: Side) -> float:
    """Add up the errors row by row."""
    total = 0.0
    for side, ups, moment in ((keys, fit.k_ups, moments.keys), (values, fit.v_ups, moments.values)):
        root = torch.linalg.cholesky(moment)
        for rows, up, weight in zip(side.rows, ups, side.weights, strict=True):
            wrong = (rows - up @ fit.down) @ root
            total += float((torch.linalg.cholesky(weight).mT @ wrong).square().sum())
    return total


def test_the_common_basis_diagonalises_both_moments():
    moments, _, _ = problem(0)
    torch.testing.assert_close(moments.into @ moments.into.mT, moments.values)
    torch.testing.assert_close((moments.into * moments.ratios) @ moments.into.mT, moments.keys)
    torch.testing.assert_close(moments.out_of @ moments.into, torch.eye(WIDTH, dtype=torch.float64))


def test_losses_are_weighted_squares():
    moments, keys, values = problem(1)
    fit = moments.start(keys, values, RANK)
    assert sum(moments.lost(fit, keys, values)) == pytest.approx(lost(moments, fit, keys, values), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_expansions_are_the_least_squares_of_their_own_moment(seed):
    moments, keys, values = problem(seed)
    found = moments.expand(draw(seed, RANK, WIDTH), keys, values)
    for ups, side, moment in ((found.k_ups, keys, moments.keys), (found.v_ups, values, moments.values)):
        root = torch.linalg.cholesky(moment)
        for up, rows in zip(ups, side.rows, strict=True):
            expected = torch.linalg.lstsq((found.down @ root).mT, (rows @ root).mT).solution.mT
            torch.testing.assert_close(up, expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_refit_solves_the_equations_of_both_moments(seed):
    moments, keys, values = problem(seed)
    before = moments.start(keys, values, RANK)
    size = RANK * WIDTH
    matrix, target = torch.zeros(size, size, dtype=torch.float64), torch.zeros(RANK, WIDTH, dtype=torch.float64)
    for side, ups, moment in ((keys, before.k_ups, moments.keys), (values, before.v_ups, moments.values)):
        for up, rows, weight in zip(ups, side.rows, side.weights, strict=True):
            matrix += torch.kron(up.mT @ weight @ up, moment)
            target += up.mT @ weight @ rows @ moment
    expected = torch.linalg.solve(matrix, target.flatten()).reshape(RANK, WIDTH)
    torch.testing.assert_close(moments.refit(before, keys, values).down, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_more_rounds_never_lose_more_and_a_wide_latent_loses_nothing(seed):
    moments, keys, values = problem(seed)
    start = moments.start(keys, values, RANK)
    errors = [lost(moments, alternate(moments, start, keys, values, rounds), keys, values) for rounds in range(6)]
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    wide = alternate(moments, moments.start(keys, values, WIDTH), keys, values, 3)
    assert lost(moments, wide, keys, values) < 1e-9 * lost(moments, start, keys, values)
