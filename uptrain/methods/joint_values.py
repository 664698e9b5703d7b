"""One shared value head for a group, fitted to the group's output as each query head averages the values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GRADIENTS = 4
"""Conjugate gradients of a round, after which the shared value is as good as solved for: a metric precedes them."""

ROUNDED = 1e-6
"""What a moment of float32 products may be wrong by, relative to its trace."""


@dataclass(frozen=True)
class SharedValues:
    """A group's shared value, and how heads read it. N = m·Dv are the dims of the group's m stacked value heads v.

    - `shared`: S (Dv, N); the shared value is S v.
    - `factors`: M (n, Dv, Dv) of the group's n query heads; head h reads M_h S v.
    """

    shared: Tensor
    factors: Tensor


@dataclass(frozen=True)
class ValueMoments:
    """What text says of a group's values as attention averages them, v̄, float64.

    - `outputs`: (n, Dv, Dv), W_oᵀ W_o of each query head.
    - `values`: (n or fewer, N, N), E[v̄ v̄ᵀ] over neighbouring query heads, evenly many each.
    - `heads`: which of the stacked value heads each query head reads, n of them.
    """

    outputs: Tensor
    values: Tensor
    heads: tuple[int, ...]


class OutputError:
    """The error of a group's output, Σ_h E‖W_o,h (v̄_h − M_h S v̄)‖², for any shared value S and factors M.

    It is quadratic in S and in M.
    """

    def __init__(self, moments: ValueMoments) -> None:
        """Begin with a group's moments."""
        self._outputs, self._values = moments.outputs, moments.values
        dims = moments.outputs.shape[-1]
        self._own = [slice(head * dims, (head + 1) * dims) for head in moments.heads]
        self._per = len(moments.heads) // len(moments.values)
        blocks = torch.stack([self._values[h // self._per, own, own] for h, own in enumerate(self._own)])
        self.total = float((self._outputs * blocks).sum())
        together = self._values.sum(0)
        self._metric = torch.linalg.cholesky(_solvable(together, ROUNDED * len(together)))

    def of(self, values: SharedValues) -> float:
        """Return the error of a shared value and its factors."""
        same, other = self._products(values.shared)
        factors = values.factors
        lost = (factors @ same - 2 * other) @ factors.mT
        return self.total + float((self._outputs * lost).sum())

    def factors(self, shared: Tensor) -> Tensor:
        """Return the factors (n, Dv, Dv) of least error for a shared value (Dv, N)."""
        same, other = self._products(shared)
        factors: Tensor = torch.linalg.solve(_solvable(same), other, left=False)
        return factors

    def shared(self, factors: Tensor, before: Tensor) -> Tensor:
        """Return a shared value (Dv, N) of less error for factors (n, Dv, Dv), some conjugate gradients from `before`.

        Each direction is taken in the metric of all heads' moments together, in which heads that average alike take
        one step.

        Source: Hestenes and Stiefel 1952, section 3, preconditioned.
        """
        felt = factors.mT @ self._outputs
        both = felt @ factors
        root = torch.linalg.cholesky(_solvable(both.sum(0)))
        found, left = before, self._wanted(felt) - self._applied(both, before)
        direction, size = torch.zeros_like(before), 0.0
        for _ in range(GRADIENTS):
            step = torch.cholesky_solve(torch.cholesky_solve(left, root).mT, self._metric).mT
            new = float((left * step).sum())
            if new <= 0:
                break
            direction = step + (new / size if size else 0.0) * direction
            applied = self._applied(both, direction)
            curvature = float((direction * applied).sum())
            if curvature <= 0:
                break
            length = new / curvature
            found, left, size = found + length * direction, left - length * applied, new
        return found

    def _products(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return S E[v̄ v̄ᵀ] Sᵀ and E[v̄_h v̄ᵀ] Sᵀ of each query head, both (n, Dv, Dv)."""
        half = shared @ self._values
        same = (half @ shared.mT).repeat_interleave(self._per, 0)
        return same, torch.stack([half[h // self._per][:, own].mT for h, own in enumerate(self._own)])

    def _applied(self, both: Tensor, shared: Tensor) -> Tensor:
        """Return Σ_h M_hᵀ W_oᵀ W_o M_h S E[v̄ v̄ᵀ], (Dv, N), from `both` (n, Dv, Dv)."""
        summed = both.unflatten(0, (-1, self._per)).sum(1)
        applied: Tensor = (summed @ shared @ self._values).sum(0)
        return applied

    def _wanted(self, felt: Tensor) -> Tensor:
        """Return Σ_h M_hᵀ W_oᵀ W_o Sel_h E[v̄ v̄ᵀ], (Dv, N), from `felt` (n, Dv, Dv)."""
        result = felt.new_zeros(felt.shape[-1], self._values.shape[-1])
        for h, own in enumerate(self._own):
            result += felt[h] @ self._values[h // self._per, own]
        return result


def alternated(error: OutputError, start: SharedValues, rounds: int) -> Iterator[SharedValues]:
    """Yield a shared value and its factors after each of `rounds` rounds: the value, then the factors in closed form.

    The error never rises.
    """
    values = start
    for _ in range(rounds):
        shared = error.shared(values.factors, values.shared)
        values = SharedValues(shared, error.factors(shared))
        yield values


def _solvable(products: Tensor, floor: float = 1e-12) -> Tensor:
    """Return symmetric products (…, D, D), solvable in dims that nothing feels; `floor` is relative to the diagonal."""
    level = products.diagonal(dim1=-2, dim2=-1).mean(-1)
    rest = torch.where(level > 0, floor * level, torch.ones_like(level))
    return products + torch.diag_embed(rest[..., None].expand(products.shape[:-1]))
