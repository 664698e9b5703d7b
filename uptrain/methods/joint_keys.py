"""One shared key head for a group, fitted to the group's logits over the distances that attention spans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.methods.distance_kernel import DistanceKernel
from uptrain.methods.rotary import Rotary, pair_means

CENTRED = 0.95
"""Share of the keys' mean that does not count as an error: softmax does not see what all keys have in common."""
HOLD = 1e-3
"""How much a step holds on to the factors before it, relative to the diagonal of what it solves."""

ROUNDED = 1e-10
"""What counts as rounding in a moment, relative to its trace."""


@dataclass(frozen=True)
class SharedKeys:
    """A group's shared key, and what its queries become. N = m·D are the dims of the group's m stacked key heads k.

    - `shared`: S (D, N); the shared key is S k.
    - `factors`: T (n, D, D) of the group's n query heads; a query q becomes T q.
    """

    shared: Tensor
    factors: Tensor


@dataclass(frozen=True)
class KeyMoments:
    """What text says of a group's queries and keys, float64.

    - `queries`: (n, D, D), Σ w q qᵀ of each query head, w how much each logit's error is felt.
    - `keys`: (N, N), E[k kᵀ] of the stacked keys by the same weights.
    - `mean`: (N,), E[k].
    - `heads`: which of the stacked key heads each query head reads, n of them.
    """

    queries: Tensor
    keys: Tensor
    mean: Tensor
    heads: tuple[int, ...]


class LogitError:
    """The error of a group's logits as attention feels it, for any shared key S and factors T.

    Σ_h E[w (qᵀ R_Δ k_h − (T_h q)ᵀ R_Δ S k)²] over queries q, stacked keys k and distances Δ, each by their weights and
    as if they knew nothing of each other, less `CENTRED` of what the mean of R_Δ k alone contributes. It is quadratic
    in S and in T.
    """

    def __init__(self, moments: KeyMoments, kernel: DistanceKernel) -> None:
        """Begin with a group's moments, and the kernel of each query head's distances or one for all."""
        self._moments, self._kernel, self._apart = moments, kernel, kernel.apart()
        self._seen, self._seen_apart = kernel.conjugate(), kernel.apart().conjugate()
        dims = moments.queries.shape[-1]
        self._own = [slice(head * dims, (head + 1) * dims) for head in moments.heads]
        self._solved = _solved(moments.keys, moments.mean)
        blocks = torch.stack([moments.keys[own, own] for own in self._own])
        means = torch.stack([moments.mean[own] for own in self._own])
        whole = kernel.average(blocks) - CENTRED * self._apart.average(means[:, :, None] * means[:, None])
        self.total = float((moments.queries * whole).sum())

    def of(self, keys: SharedKeys) -> float:
        """Return the error of a shared key and its factors."""
        same, other = self._products(keys.shared)
        factors = keys.factors
        lost = factors.mT @ (same @ factors - 2 * other)
        return self.total + float((self._moments.queries * lost).sum())

    def factors(self, shared: Tensor, before: Tensor) -> Tensor:
        """Return the factors (n, D, D) of least error for a shared key (D, N); they hold on to those `before`."""
        same, other = self._products(shared)
        hold = _hold(same)
        factors: Tensor = torch.linalg.solve(same + torch.diag_embed(hold), other + hold[..., None] * before)
        return factors

    def shared(self, factors: Tensor, before: Tensor) -> Tensor:
        """Return the shared key (D, N) of least error for factors (n, D, D); it holds on to the one `before`.

        With A S C − A' S m mᵀ = B C − B' m mᵀ, the mean's part is a correction of rank one.
        """
        mean, solved = self._moments.mean, self._solved
        left, right = self._sums(factors, self._seen)
        left_mean, right_mean = (CENTRED * each for each in self._sums(factors, self._seen_apart))
        hold = _hold(left)
        left = left + torch.diag(hold)
        right = right + hold[:, None] * before
        felt = float(solved @ mean)
        centre = torch.linalg.solve(left - felt * left_mean, (right - felt * right_mean) @ mean)
        found: Tensor = torch.linalg.solve(left, right - torch.outer(right_mean @ mean - left_mean @ centre, solved))
        return found

    def _products(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return P = E[R S k kᵀ Sᵀ Rᵀ] (…, D, D) and Q = E[R S k k_hᵀ Rᵀ] (n, D, D), with the mean's part taken out."""
        moments = self._moments
        half, centre = shared @ moments.keys, shared @ moments.mean
        other = torch.stack([half[:, own] for own in self._own])
        means = torch.stack([torch.outer(centre, moments.mean[own]) for own in self._own])
        same = self._kernel.average(half @ shared.mT) - CENTRED * self._apart.average(torch.outer(centre, centre))
        return same, self._kernel.average(other) - CENTRED * self._apart.average(means)

    def _sums(self, factors: Tensor, kernel: DistanceKernel) -> tuple[Tensor, Tensor]:
        """Return Σ_h E[Rᵀ T C_q Tᵀ R] (D, D) and Σ_h E[Rᵀ T C_q R] Sel_h (D, N)."""
        half = factors @ self._moments.queries
        left = kernel.average(half @ factors.mT).sum(0)
        right = left.new_zeros(len(left), len(self._moments.mean))
        for own, each in zip(self._own, kernel.average(half), strict=True):
            right[:, own] += each
        return left, right


def alternated(error: LogitError, start: SharedKeys, rounds: int) -> Iterator[SharedKeys]:
    """Yield a shared key and its factors after each of `rounds` rounds: factors, then the key, both in closed form.

    The error never rises. Each step holds on to what was before, so a start without error stays as it is, and few
    rounds don't fit what a small text has by chance.

    Source: alternating least squares with a proximal term, as in Xu and Yin 2013, equation 1.3b.
    """
    keys = start
    for _ in range(rounds):
        factors = error.factors(keys.shared, keys.factors)
        keys = SharedKeys(error.shared(factors, keys.shared), factors)
        yield keys


def balanced(keys: SharedKeys, position: Rotary | None) -> SharedKeys:
    """Return the same logits from factors whose rows have mean square 1, as an identity's, times a head's dims.

    A rope pair has one scale, and each unrotated dim its own: scales commute with rotation.
    """
    energy = keys.factors.square().sum(-1).mean(0)
    if position is not None:
        real, imaginary = position.indices()
        energy = energy.clone()
        energy[real] = energy[imaginary] = pair_means(energy, position)
    scale = torch.where(energy > 0, energy, torch.ones_like(energy)).sqrt()
    return SharedKeys(keys.shared * scale[:, None], keys.factors / scale[:, None])


def _hold(products: Tensor) -> Tensor:
    """Return how much each dim (…, D) holds on to what was before, from what a step solves (…, D, D)."""
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    level = diagonal.mean(-1, keepdim=True)
    floor = torch.where(level > 0, 1e-9 * level, torch.ones_like(level))
    return HOLD * diagonal.clamp(min=0) + floor


def _solved(products: Tensor, wanted: Tensor, repeats: int = 8) -> Tensor:
    """Return y (N,) with products y = wanted, and little of y where products (N, N) are no more than rounding.

    Heads that are alike leave a moment singular.

    Source: Riley 1955, Solving systems of linear equations with a positive definite, symmetric matrix, section 3.
    """
    level = ROUNDED * float(products.trace()) or 1.0
    root = torch.linalg.cholesky(products + level * torch.eye(len(products), dtype=products.dtype))
    found = torch.zeros_like(wanted)
    for _ in range(repeats):
        found = found + torch.cholesky_solve((wanted - products @ found)[:, None], root)[:, 0]
    return found
