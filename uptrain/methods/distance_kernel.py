"""Rotations averaged over the distances that attention spans: which rope pairs can serve one another, and how well."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.methods.rotary import Rotary


@dataclass(frozen=True)
class DistanceKernel:
    """The average of R_Δ M R_Δᵀ over distances Δ, with R_Δ the rotation of a key as a query Δ tokens later sees it.

    R_Δ multiplies rope pair a, as a complex number, by e^{−iθ_aΔ}, and leaves unrotated dims as they are. So the
    average is one factor for each product of two pairs, which says how much of it distances leave.

    - `position`: which dims are rotated, None where none is.
    - `differences`: (…, pairs, pairs) complex128, E[e^{−i(θ_a − θ_b)Δ}], which z_a z̄_b is multiplied by.
    - `sums`: (…, pairs, pairs) complex128, E[e^{−i(θ_a + θ_b)Δ}], which z_a z_b is multiplied by.
    - `means`: (…, pairs) complex128, E[e^{−iθ_aΔ}], which products of z_a with an unrotated dim are multiplied by.

    Source: Su et al. 2021, RoFormer, equation 12: a logit depends on pair a's rotation by e^{−iθ_aΔ} alone.
    """

    position: Rotary | None
    differences: Tensor
    sums: Tensor
    means: Tensor

    @classmethod
    def of(cls, position: Rotary | None, inverse_frequencies: Tensor | None, distances: Tensor) -> DistanceKernel:
        """Return the kernel of measured distances.

        - `position`: which dims are rotated, None where none is.
        - `inverse_frequencies`: θ (pairs,), in radians per token; None where no dim is rotated.
        - `distances`: (…, T), the weight of each distance Δ; weights of zero alone count as all at Δ = 0.

        Raises:
            ValueError: dims are rotated, and their inverse frequencies are not one for each pair.
        """
        if position is None:
            none = torch.zeros(*distances.shape[:-1], 0, dtype=torch.complex128)
            return cls(None, none[..., None], none[..., None], none)
        if inverse_frequencies is None or inverse_frequencies.shape != (position.pairs,):
            raise ValueError(f"{position.pairs} rope pairs need as many inverse frequencies")
        share = shares(distances)
        angles = inverse_frequencies.double()[:, None] * torch.arange(share.shape[-1], dtype=torch.float64)
        phases = torch.polar(torch.ones_like(angles), -angles)
        weighted = share[..., None, :] * phases
        return cls(position, weighted @ phases.mH, weighted @ phases.mT, weighted.sum(-1))

    @classmethod
    def far(cls, position: Rotary | None) -> DistanceKernel:
        """Return the kernel of distances so long and even that a pair has nothing in common with any but itself."""
        pairs = 0 if position is None else position.pairs
        none = torch.zeros(pairs, pairs, dtype=torch.complex128)
        return cls(position, torch.eye(pairs, dtype=torch.complex128), none, none.sum(0))

    def conjugate(self) -> DistanceKernel:
        """Return the average of R_Δᵀ M R_Δ: the rotations of a query as a key Δ tokens before sees it."""
        return DistanceKernel(self.position, self.differences.conj(), self.sums.conj(), self.means.conj())

    def apart(self) -> DistanceKernel:
        """Return the average of R_Δ M R_Δ'ᵀ over distances Δ and Δ' that know nothing of each other: E[R] M E[R]ᵀ."""
        means, others = self.means[..., :, None], self.means[..., None, :]
        return DistanceKernel(self.position, means * others.conj(), means * others, self.means)

    def average(self, products: Tensor) -> Tensor:
        """Return E[R_Δ M R_Δᵀ] for M (…, D, D) float64; leading dims broadcast with the kernel's."""
        if self.position is None:
            return products
        real, imaginary = self.position.indices()
        shape = torch.broadcast_shapes(products.shape[:-2], self.means.shape[:-1])
        result = products.expand(*shape, *products.shape[-2:]).clone()
        upper, lower = products[..., real, :], products[..., imaginary, :]
        rr, ri, ir, ii = upper[..., real], upper[..., imaginary], lower[..., real], lower[..., imaginary]
        # z_a z̄_b and z_a z_b, of which the four products of real and imaginary parts are made.
        straight = torch.complex(rr + ii, ir - ri) * self.differences
        crossed = torch.complex(rr - ii, ir + ri) * self.sums
        for rows, columns, part in (
            (real, real, straight.real + crossed.real),
            (imaginary, imaginary, straight.real - crossed.real),
            (imaginary, real, crossed.imag + straight.imag),
            (real, imaginary, crossed.imag - straight.imag),
        ):
            result[..., rows[:, None], columns[None]] = part / 2
        rest = slice(self.position.dims, None)
        left = torch.complex(upper[..., rest], lower[..., rest]) * self.means[..., None]
        result[..., real, rest], result[..., imaginary, rest] = left.real, left.imag
        right = torch.complex(products[..., rest, real], products[..., rest, imaginary]) * self.means[..., None, :]
        result[..., rest, real], result[..., rest, imaginary] = right.real, right.imag
        return result


def shares(distances: Tensor) -> Tensor:
    """Return weights of distances (…, T) as shares of their sum, float64; zeros alone as all at distance 0."""
    weights = distances.double()
    total = weights.sum(-1, keepdim=True)
    nearest = torch.zeros_like(weights)
    nearest[..., 0] = 1
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(torch.float64).tiny), nearest)


def uniform_distances(tokens: int) -> Tensor:
    """Return the weights (T,) of distances where every token of a block attends evenly to itself and all before it."""
    return torch.arange(tokens, 0, -1, dtype=torch.float64)
