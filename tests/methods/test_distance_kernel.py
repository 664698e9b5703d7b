"""A distance kernel is the sum over distances, written out with rotation matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from uptrain.methods.distance_kernel import DistanceKernel, shares, uniform_distances
from uptrain.methods.rotary import Rotary

DIMS, TOKENS = 10, 7
LAYOUTS = [Rotary("half", 10), Rotary("interleaved", 10), Rotary("half", 6), Rotary("interleaved", 4), None]


def rotation(position: Rotary | None, frequencies: Tensor, distance: int) -> Tensor:
    """Return what a key is multiplied by where a query `distance` tokens later reads it, dim by dim."""
    turn = torch.eye(DIMS, dtype=torch.float64)
    for pair in range(0 if position is None else position.pairs):
        assert position is not None
        half = position.pairs
        i, j = (pair, pair + half) if position.pairing == "half" else (2 * pair, 2 * pair + 1)
        angle = frequencies[pair] * distance
        turn[i, i] = turn[j, j] = torch.cos(angle)
        turn[i, j], turn[j, i] = torch.sin(angle), -torch.sin(angle)
    return turn


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frequencies_of(position: Rotary | None) -> Tensor:
    return 3.0 ** -torch.arange(0 if position is None else position.pairs, dtype=torch.float64)


@pytest.mark.parametrize("position", LAYOUTS)
def test_the_average_is_the_sum_over_distances(position: Rotary | None) -> None:
    frequencies, products = frequencies_of(position), draw(2, DIMS, DIMS)
    distances = draw(2, TOKENS, seed=1).abs()
    kernel = DistanceKernel.of(position, None if position is None else frequencies, distances)
    for head in range(2):
        turns = [rotation(position, frequencies, distance) for distance in range(TOKENS)]
        share = distances[head] / distances[head].sum()
        seen = sum(w * r @ products[head] @ r.T for w, r in zip(share, turns, strict=True))
        given = sum(w * r.T @ products[head] @ r for w, r in zip(share, turns, strict=True))
        mean = sum(w * r for w, r in zip(share, turns, strict=True))
        torch.testing.assert_close(kernel.average(products)[head], seen)
        torch.testing.assert_close(kernel.conjugate().average(products)[head], given)
        torch.testing.assert_close(kernel.apart().average(products)[head], mean @ products[head] @ mean.T)


@pytest.mark.parametrize("position", LAYOUTS)
def test_one_matrix_is_averaged_for_each_head(position: Rotary | None) -> None:
    distances = draw(3, TOKENS, seed=1).abs()
    inverse = None if position is None else frequencies_of(position)
    together = DistanceKernel.of(position, inverse, distances).average(draw(DIMS, DIMS).expand(3, -1, -1))
    for head in range(3):
        alone = DistanceKernel.of(position, inverse, distances[head]).average(draw(DIMS, DIMS))
        torch.testing.assert_close(together[head], alone)


def test_attention_that_looks_nowhere_looks_at_the_token_itself() -> None:
    assert shares(torch.zeros(2, 3)).tolist() == [[1, 0, 0], [1, 0, 0]]


def test_even_attention_sees_each_distance_as_often_as_a_block_has_it() -> None:
    pairs = [t - s for t in range(5) for s in range(t + 1)]
    assert uniform_distances(5).tolist() == [pairs.count(distance) for distance in range(5)]


@pytest.mark.parametrize("inverse", [None, torch.ones(4)])
def test_rotated_dims_need_an_inverse_frequency_for_each_pair(inverse: Tensor | None) -> None:
    with pytest.raises(ValueError, match="inverse frequencies"):
        DistanceKernel.of(Rotary("half", 6), inverse, torch.ones(3))
