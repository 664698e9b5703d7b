import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.layers import random_moment
from uptrain.methods import low_rank as module
from uptrain.methods.low_rank import damped, factor, matrix_root


def blocks_of(sizes, columns, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, columns, generator=generator, dtype=dtype) for n in sizes]


def lefts_of(sizes, seed, dtype=torch.float64):
    return [
        matrix_root(b @ b.mH + 0.1 * torch.eye(len(b), dtype=dtype))
        for b in (blocks_of([n], n, seed + i, dtype)[0] for i, n in enumerate(sizes))
    ]


def weighted_error(blocks, lefts, sigma, found):
    root = np.linalg.cholesky(sigma.numpy())
    return sum(
        np.linalg.norm((left @ (block - up @ found.down)).numpy() @ root) ** 2
        for block, left, up in zip(blocks, lefts, found.ups, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    columns=st.integers(2, 9),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_error_is_the_tail_of_the_weighted_spectrum(dtype, sizes, columns, seed, data):
    rank = data.draw(st.integers(1, sum(sizes)))
    blocks, lefts, sigma = (
        blocks_of(sizes, columns, seed, dtype),
        lefts_of(sizes, seed, dtype),
        random_moment(columns - 1, seed),
    )
    found = factor(blocks, lefts, sigma, rank)
    stack = np.concatenate([(left @ block).numpy() for left, block in zip(lefts, blocks, strict=True)])
    energies = np.linalg.svd(stack @ np.linalg.cholesky(sigma.numpy()), compute_uv=False) ** 2
    assert found.lost == pytest.approx(energies[rank:].sum(), rel=1e-8, abs=1e-10 * energies.sum())
    assert found.explained + found.lost == pytest.approx(energies.sum(), rel=1e-10)
    assert weighted_error(blocks, lefts, sigma, found) == pytest.approx(found.lost, rel=1e-6, abs=1e-9 * energies.sum())


def test_full_rank_is_exact_even_when_text_and_weights_are_degenerate():
    blocks, lefts = blocks_of([4, 4], 12, 0), lefts_of([4, 4], 0)
    sigma = torch.zeros(12, 12, dtype=torch.float64)
    sigma[0, 0] = 1.0
    found = factor(blocks, lefts, sigma, 8)
    for block, up in zip(blocks, found.ups, strict=True):
        torch.testing.assert_close(up @ found.down, block, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("sizes", "columns", "rank"), [([40, 40], 30, 12), ([40, 40], 30, 35), ([6, 6], 70, 5)])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_gram_routes_agree_with_the_direct_one(monkeypatch, sizes, columns, rank, weighted):
    blocks = blocks_of(sizes, columns, 3)
    lefts = lefts_of(sizes, 3) if weighted else None
    sigma = random_moment(columns - 1, 3) if weighted else None
    direct = factor(blocks, lefts, sigma, rank)
    monkeypatch.setattr(module, "GRAM_ABOVE", 10)
    by_gram = factor(blocks, lefts, sigma, rank)
    for one, other in zip(direct.ups, by_gram.ups, strict=True):
        torch.testing.assert_close(one @ direct.down, other @ by_gram.down, rtol=1e-6, atol=1e-7)
    assert by_gram.lost == pytest.approx(direct.lost, rel=1e-7, abs=1e-9)


def test_repeated_singular_values_have_one_basis_whatever_the_decomposition_gives(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    stack = basis @ torch.diag(torch.tensor([3.0, 2, 2, 2, 1, 1], dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    one = factor([stack], None, None, 4)
    other = factor([stack @ turn], None, None, 4)
    torch.testing.assert_close(one.ups[0], other.ups[0], rtol=1e-9, atol=1e-9)


def test_columns_have_the_scale_of_an_identity_and_a_fixed_sign():
    found = factor(blocks_of([4, 4, 4], 9, 1), lefts_of([4, 4, 4], 1), random_moment(8, 1), 4)
    stacked = torch.cat(found.ups)
    torch.testing.assert_close(stacked.square().sum(0), torch.full((4,), 3.0, dtype=torch.float64))


def test_weights_that_see_nothing_still_factor():
    zeros = [matrix_root(torch.zeros(3, 3, dtype=torch.float64))] * 2
    found = factor(blocks_of([3, 3], 8, 2), zeros, damped(random_moment(7, 2), 1e-3), 3)
    assert all(bool(torch.isfinite(up).all()) for up in found.ups)


@pytest.mark.parametrize("rank", [0, 9])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank .*{rank}.*8 rows"):
        factor(blocks_of([4, 4], 9, 0), None, None, rank)
