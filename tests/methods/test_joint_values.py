"""The alternated fit of shared values lowers the output's own error, as far as any optimiser could."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from uptrain.methods.joint_values import OutputError, SharedValues, ValueMoments, alternated

DIMS, STACKED, QUERIES, SAMPLES, OUT = 4, 3, 6, 50, 9
READS = (0, 0, 1, 1, 2, 2)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def averages(moments: int, seed: int = 0) -> Tensor:
    """Return averaged stacked values (moments, samples, N) that differ from head to head."""
    return draw(moments, SAMPLES, STACKED * DIMS, seed=seed) * torch.logspace(0, -1, STACKED * DIMS).double()


def outputs(seed: int = 1) -> Tensor:
    return draw(QUERIES, OUT, DIMS, seed=seed)


def error_of(values: Tensor, weights: Tensor) -> OutputError:
    products = torch.stack([each.mT @ each for each in values])
    return OutputError(ValueMoments(weights.mT @ weights, products, READS))


def literal(values: Tensor, weights: Tensor, shared: Tensor, factors: Tensor) -> Tensor:
    """Return the error of every average's output."""
    whole = torch.zeros((), dtype=torch.float64)
    for head, read in enumerate(READS):
        seen = values[head * len(values) // QUERIES]
        wrong = seen[:, read * DIMS : (read + 1) * DIMS] - seen @ shared.mT @ factors[head].mT
        whole = whole + (wrong @ weights[head].mT).square().sum()
    return whole


def start(seed: int = 2) -> SharedValues:
    return SharedValues(draw(DIMS, STACKED * DIMS, seed=seed), draw(QUERIES, DIMS, DIMS, seed=seed + 1))


@pytest.mark.parametrize("moments", [1, 3, 6])
def test_the_error_is_that_of_every_output(moments: int) -> None:
    values, weights, chosen = averages(moments), outputs(), start()
    error = error_of(values, weights)
    assert error.of(chosen) == pytest.approx(float(literal(values, weights, chosen.shared, chosen.factors)))
    assert error.total == pytest.approx(float(literal(values, weights, 0 * chosen.shared, chosen.factors)))


@pytest.mark.parametrize("moments", [2, 6])
def test_it_reaches_what_a_generic_optimiser_finds_and_never_rises(moments: int) -> None:
    values, weights, chosen = averages(moments), outputs(), start()
    error = error_of(values, weights)
    found = [error.of(chosen), *(error.of(each) for each in alternated(error, chosen, 60))]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(found))
    shared, factors = chosen.shared.clone().requires_grad_(), chosen.factors.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([shared, factors], max_iter=200, history_size=50, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = literal(values, weights, shared, factors)
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    assert found[-1] <= float(literal(values, weights, shared.detach(), factors.detach())) * (1 + 1e-3)


def test_one_moment_for_all_is_solved_by_eigenvectors() -> None:
    values, weights = averages(1), outputs()
    roots = [torch.linalg.cholesky(sum(weights[h].mT @ weights[h] for h in (2 * g, 2 * g + 1))).mT for g in range(3)]
    moment = torch.linalg.cholesky(values[0].mT @ values[0])
    singular = torch.linalg.svdvals(torch.block_diag(*roots) @ moment)
    *_, found = alternated(error_of(values, weights), start(), 200)
    assert error_of(values, weights).of(found) == pytest.approx(float(singular[DIMS:].square().sum()), rel=1e-4)


def test_heads_that_are_alike_are_shared_without_loss() -> None:
    one, mixes = averages(QUERIES)[..., :DIMS], draw(STACKED, DIMS, DIMS, seed=7)
    values = torch.cat([one @ mix.mT for mix in mixes], dim=2)
    shared = torch.cat([mixes[0].inverse(), torch.zeros(DIMS, (STACKED - 1) * DIMS, dtype=torch.float64)], dim=1)
    exact = SharedValues(shared, mixes[list(READS)])
    for each in alternated(error_of(values, outputs()), exact, 5):
        for head, read in enumerate(READS):
            torch.testing.assert_close(
                values[head] @ each.shared.mT @ each.factors[head].mT,
                values[head][:, read * DIMS : (read + 1) * DIMS], rtol=1e-6, atol=1e-6,
            )  # fmt: skip
