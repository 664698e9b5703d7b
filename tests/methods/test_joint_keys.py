"""The joint fit of shared keys lowers the logits' own error, as far as any optimiser could."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.methods.test_distance_kernel import rotation
from uptrain.methods import joint_keys
from uptrain.methods.distance_kernel import DistanceKernel
from uptrain.methods.joint_keys import CENTRED, KeyMoments, LogitError, SharedKeys, alternated, balanced
from uptrain.methods.rotary import Rotary

DIMS, STACKED, QUERIES, SAMPLES, TOKENS = 10, 2, 3, 30, 6
READS = (0, 0, 1)
LAYOUTS = {
    "half": Rotary("half", 10),
    "interleaved": Rotary("interleaved", 10),
    "half, partial": Rotary("half", 6),
    "interleaved, partial": Rotary("interleaved", 4),
    "unrotated": None,
}
layouts = pytest.mark.parametrize("position", LAYOUTS.values(), ids=LAYOUTS)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Group:
    """A group's queries (n, samples, D), stacked keys (samples, N), and distances (n, T) or (T,)."""

    position: Rotary | None
    queries: Tensor
    keys: Tensor
    distances: Tensor

    @property
    def frequencies(self) -> Tensor:
        return 2.0 ** -torch.arange(0 if self.position is None else self.position.pairs, dtype=torch.float64)

    @property
    def error(self) -> LogitError:
        products = torch.stack([each.mT @ each for each in self.queries])
        moments = KeyMoments(products, self.keys.mT @ self.keys / len(self.keys), self.keys.mean(0), READS)
        frequencies = None if self.position is None else self.frequencies
        return LogitError(moments, DistanceKernel.of(self.position, frequencies, self.distances))

    def literal(self, found: SharedKeys) -> float:
        """Return the error summed over every query, key and distance."""
        whole = 0.0
        for head, (queries, read) in enumerate(zip(self.queries, READS, strict=True)):
            weights = self.distances if self.distances.ndim == 1 else self.distances[head]
            own = self.keys[:, read * DIMS : (read + 1) * DIMS]
            wrong = []
            for distance in range(TOKENS):
                turn = rotation(self.position, self.frequencies, distance)
                logits = queries @ turn @ own.mT
                wrong.append(logits - queries @ found.factors[head].mT @ turn @ found.shared @ self.keys.mT)
            share = (weights / weights.sum())[:, None]
            every = torch.stack(wrong)
            mean = (share * every.mean(2)).sum(0)
            whole += float((share * every.square().mean(2)).sum() - CENTRED * mean.square().sum())
        return whole


def group(position: Rotary | None, apart: bool, seed: int = 0) -> Group:
    distances = draw(*((QUERIES, TOKENS) if apart else (TOKENS,)), seed=seed).abs()
    keys = draw(SAMPLES, STACKED * DIMS, seed=seed + 1) + draw(STACKED * DIMS, seed=seed + 2)
    return Group(position, draw(QUERIES, SAMPLES, DIMS, seed=seed + 3), keys, distances)


def start(seed: int = 5) -> SharedKeys:
    return SharedKeys(draw(DIMS, STACKED * DIMS, seed=seed), draw(QUERIES, DIMS, DIMS, seed=seed + 1))


@layouts
@pytest.mark.parametrize("apart", [True, False])
def test_the_error_is_that_of_every_logit_at_every_distance(position: Rotary | None, apart: bool) -> None:
    given, keys = group(position, apart), start()
    assert given.error.of(keys) == pytest.approx(given.literal(keys), rel=1e-9)
    nothing = SharedKeys(0 * keys.shared, keys.factors)
    assert given.error.total == pytest.approx(given.literal(nothing), rel=1e-9)


def least(error: Callable[[Tensor], Tensor], begin: Tensor) -> float:
    """Return the least of `error` that a generic optimiser finds."""
    free = begin.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free], max_iter=400, history_size=100, line_search_fn="strong_wolfe",
        tolerance_grad=1e-9, tolerance_change=0,
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        value = error(free)
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    return float(error(free.detach()))


@layouts
def test_each_step_is_what_a_generic_optimiser_finds(position: Rotary | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_keys, "HOLD", 0.0)
    given, keys = group(position, apart=True), start()
    error, turns = given.error, [rotation(position, given.frequencies, distance) for distance in range(TOKENS)]

    def literal(shared: Tensor, factors: Tensor) -> Tensor:
        whole = torch.zeros((), dtype=torch.float64)
        for head, (queries, read) in enumerate(zip(given.queries, READS, strict=True)):
            share = given.distances[head] / given.distances[head].sum()
            own = given.keys[:, read * DIMS : (read + 1) * DIMS]
            wrong = torch.stack([
                queries @ (turn @ own.mT - factors[head].mT @ turn @ shared @ given.keys.mT) for turn in turns
            ])  # fmt: skip
            mean = (share[:, None] * wrong.mean(2)).sum(0)
            whole = whole + (share[:, None] * wrong.square().mean(2)).sum() - CENTRED * mean.square().sum()
        return whole

    factors = error.factors(keys.shared, keys.factors)
    best = least(lambda free: literal(keys.shared, free), keys.factors)
    assert error.of(SharedKeys(keys.shared, factors)) == pytest.approx(best, rel=1e-6)
    shared = error.shared(factors, keys.shared)
    best = least(lambda free: literal(free, factors), keys.shared)
    assert error.of(SharedKeys(shared, factors)) == pytest.approx(best, rel=1e-6)


@layouts
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("seed", [0, 10])
def test_the_error_never_rises(position: Rotary | None, apart: bool, seed: int) -> None:
    error, keys = group(position, apart, seed).error, start(seed)
    found = [error.of(keys), *(error.of(each) for each in alternated(error, keys, 30))]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(found))
    assert found[-1] < 0.5 * error.total < found[0]


def turned(position: Rotary | None, seed: int) -> Tensor:
    """Return a random (D, D) map that commutes with the position's rotation."""
    if position is None:
        return draw(DIMS, DIMS, seed=seed)
    real, imaginary = position.indices()
    turn = torch.zeros(DIMS, DIMS, dtype=torch.float64)
    a, b = draw(2, position.pairs, seed=seed)
    turn[real, real], turn[imaginary, imaginary], turn[imaginary, real], turn[real, imaginary] = a, a, b, -b
    rest = slice(position.dims, None)
    turn[rest, rest] = draw(DIMS - position.dims, DIMS - position.dims, seed=seed + 1)
    return turn


@layouts
def test_heads_that_are_alike_stay_shared_without_loss(position: Rotary | None) -> None:
    plain, turn = group(position, apart=True), turned(position, 20)
    one = plain.keys[:, :DIMS]
    given = Group(position, plain.queries, torch.cat([one, one @ turn.mT], dim=1), plain.distances)
    shared = torch.cat([torch.eye(DIMS, dtype=torch.float64), torch.zeros(DIMS, DIMS, dtype=torch.float64)], dim=1)
    eye = torch.eye(DIMS, dtype=torch.float64)
    exact = SharedKeys(shared, torch.stack([eye, eye, turn.mT]))
    *_, found = alternated(given.error, exact, 10)
    after = balanced(found, position)
    for distance in range(TOKENS):
        seen = rotation(position, given.frequencies, distance)
        for head, read in enumerate(READS):
            own = given.keys[:, read * DIMS : (read + 1) * DIMS]
            expected = given.queries[head] @ seen @ own.mT
            logits = given.queries[head] @ after.factors[head].mT @ seen @ after.shared @ given.keys.mT
            torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@layouts
def test_balancing_changes_no_logit_and_gives_queries_their_size(position: Rotary | None) -> None:
    error, keys = group(position, apart=True).error, start()
    even = balanced(keys, position)
    assert error.of(even) == pytest.approx(error.of(keys), rel=1e-9)
    energy = even.factors.square().sum(2).mean(0)
    rotated = 0 if position is None else position.dims
    assert energy[:rotated].mean() == pytest.approx(1.0) or not rotated
    torch.testing.assert_close(energy[rotated:], torch.ones(DIMS - rotated, dtype=torch.float64))


def test_a_group_that_nothing_reads_stays_as_it_is() -> None:
    plain = group(LAYOUTS["half"], apart=True)
    silent, keys = Group(plain.position, 0 * plain.queries, 0 * plain.keys, 0 * plain.distances), start()
    *_, found = alternated(silent.error, keys, 3)
    torch.testing.assert_close(found.shared, keys.shared)
    torch.testing.assert_close(found.factors, keys.factors)
