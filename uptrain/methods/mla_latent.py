"""Fit one latent to keys and values that have second moments of their own, by alternating closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.methods.low_rank import factor, matrix_root

RIDGE = 1e-10
"""What is added to the diagonal of the small equations, relative to its mean."""


@dataclass(frozen=True)
class Side:
    """The keys or the values that a latent expands to: `rows` (n, D, d̃), whose errors `weights` (n, D, D) weigh."""

    rows: Tensor
    weights: Tensor


@dataclass(frozen=True)
class LatentFit:
    """The latent's map `down` (r, d̃), and what expands it, `k_ups` (n, D, r) and `v_ups` (G, Dv, r)."""

    down: Tensor
    k_ups: Tensor
    v_ups: Tensor


@dataclass(frozen=True)
class TwoMoments:
    """The second moments (d̃, d̃) of a layer's inputs as keys and as values, positive definite, and their common basis.

    The common basis Z has ZᵀΣ_v Z = I and ZᵀΣ_k Z = diag(`ratios`); `into` is Z⁻ᵀ and `out_of` is Zᵀ.

    Source: Golub and Van Loan 2013, Matrix Computations, section 8.7 (simultaneous diagonalisation).
    """

    keys: Tensor
    values: Tensor
    ratios: Tensor
    into: Tensor
    out_of: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> TwoMoments:
        """Return the moments with their common basis."""
        left = torch.linalg.cholesky(values)
        half = torch.linalg.solve_triangular(left, keys, upper=False)
        ratios, basis = torch.linalg.eigh(_symmetric(torch.linalg.solve_triangular(left, half.mT, upper=False)))
        out_of = torch.linalg.solve_triangular(left.mT, basis, upper=True).mT
        return cls(keys, values, ratios.clamp(min=0), left @ basis, out_of)

    def start(self, keys: Side, values: Side, rank: int) -> LatentFit:
        """Return the latent that is best under one moment, the mean of the two at unit trace."""
        sizes = float(self.keys.trace()), float(self.values.trace())
        moment = self.keys / (2 * max(sizes[0], 1e-30)) + self.values / (2 * sizes[1])
        blocks, roots = [], []
        for side, size in zip((keys, values), sizes, strict=True):
            for row, weight in zip(side.rows, side.weights, strict=True):
                blocks.append(row)
                roots.append(matrix_root(weight) * size**0.5)
        found = factor(blocks, roots, moment, min(rank, sum(len(block) for block in blocks)))
        down = torch.nn.functional.pad(found.down, (0, 0, 0, rank - len(found.down)))
        ups = [torch.nn.functional.pad(up, (0, rank - len(found.down))) for up in found.ups]
        count = len(keys.rows)
        return LatentFit(down, torch.stack(ups[:count]), torch.stack(ups[count:]))

    def expand(self, down: Tensor, keys: Side, values: Side) -> LatentFit:
        """Return the latent `down` with the least-squares expansions, each side under its own moment."""
        ups = []
        for side, moment in ((keys, self.keys), (values, self.values)):
            read = down @ moment
            ups.append((side.rows @ read.mT) @ torch.linalg.pinv(_symmetric(read @ down.mT), hermitian=True))
        return LatentFit(down, *ups)

    def refit(self, fit: LatentFit, keys: Side, values: Side) -> LatentFit:
        """Return the fit with the best map for its expansions, and then the best expansions for that.

        M_k A Σ_k + M_v A Σ_v = R_k Σ_k + R_v Σ_v is diagonal in the common bases of (M_k, M_v) and (Σ_k, Σ_v).
        """
        (m_keys, r_keys), (m_values, r_values) = _normal(fit.k_ups, keys), _normal(fit.v_ups, values)
        whole = _symmetric(m_keys + m_values)
        top, turned = torch.linalg.eigh(whole)
        seen = top > RIDGE * top[-1]
        half = turned[:, seen] / top[seen].sqrt()
        shares, basis = torch.linalg.eigh(_symmetric(half.mT @ m_keys @ half))
        half = half @ basis
        share = shares.clamp(0, 1)[:, None]
        product = half.mT @ (r_keys @ self.into) * self.ratios + half.mT @ (r_values @ self.into)
        solved = product / (share * self.ratios + (1 - share)).clamp(min=torch.finfo(torch.float64).tiny)
        return self.expand(half @ (solved @ self.out_of), keys, values)

    def energies(self, keys: Side, values: Side) -> tuple[float, float]:
        """Return the weighted energy of the keys and of the values."""
        return _energy(keys.rows, keys.weights, self.keys), _energy(values.rows, values.weights, self.values)

    def lost(self, fit: LatentFit, keys: Side, values: Side) -> tuple[float, float]:
        """Return the weighted error of the keys and of the values."""
        wrong = keys.rows - fit.k_ups @ fit.down, values.rows - fit.v_ups @ fit.down
        return _energy(wrong[0], keys.weights, self.keys), _energy(wrong[1], values.weights, self.values)


def alternate(moments: TwoMoments, fit: LatentFit, keys: Side, values: Side, rounds: int) -> LatentFit:
    """Return a fit after at most `rounds` refits, ended by the first that gains nothing.

    - `moments`: of the layer's inputs.
    - `fit`: where to begin.
    - `keys`, `values`: what the latent expands to.
    - `rounds`: how many refits at most.
    """
    lost = sum(moments.lost(fit, keys, values))
    for _ in range(rounds):
        after = moments.refit(fit, keys, values)
        error = sum(moments.lost(after, keys, values))
        if not error < lost:
            break
        fit, lost = after, error
    return fit


def _normal(ups: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """Return Σ UᵀWU (r, r) and Σ UᵀW rows (r, d̃)."""
    weighed = ups.mT @ side.weights
    return (weighed @ ups).sum(0), (weighed @ side.rows).sum(0)


def _energy(rows: Tensor, weights: Tensor, moment: Tensor) -> float:
    return float((weights * ((rows @ moment) @ rows.mT)).sum())


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
