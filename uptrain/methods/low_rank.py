"""The kernel under every conversion: the best low-rank factorisation of a stack of maps, weighted on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GRAM_ABOVE = 512
"""Entries of the stack's longer side above which the Gram matrix is decomposed instead of the stack itself."""

CLUSTER = 1e-12
"""Squared singular values closer than this, relative to the largest, count as one repeated value."""


@dataclass(frozen=True)
class Factored:
    """A factorisation W_i ≈ ups[i] @ down, and the weighted energy that it explains and loses.

    - `down`: (rank, d̃).
    - `ups`: (n_i, rank) each.
    - `explained`, `lost`: sums of squared singular values.
    """

    down: Tensor
    ups: list[Tensor]
    explained: float
    lost: float


def factor(
    blocks: Sequence[Tensor],
    left_weights: Sequence[Tensor] | None,
    second_moment: Tensor | None,
    rank: int,
) -> Factored:
    """Factor the stacked maps W_i into B_i A at `rank`, minimising Σ_i ‖L_i (W_i − B_i A) Σ^½‖²_F.

    X = stack(L_i W_i) Σ^½ = U S Vᴴ gives A = U_rᴴ stack(L_i W_i) and B_i = L_i⁻¹ U_r[i]. No inverse of Σ is needed, and
    rank = Σ n_i is exact for any Σ. Columns of each B_i are scaled: their mean square over the stack is that of an
    identity.

    - `blocks`: W_i (n_i, d̃), float64 or complex128.
    - `left_weights`: L_i (n_i, n_i), invertible; None for identities.
    - `second_moment`: Σ (d̃, d̃), real, E[x̃x̃ᵀ] already damped; None for the identity.
    - `rank`: the rows of A.

    Raises:
        ValueError: the rank is below 1 or above Σ n_i.

    Source: Eckart and Young 1936, for the two-sided norm as in Srebro and Jaakkola 2003, section 2 (weights that
    factor into rows times columns keep the closed form); one-sided in Wang et al. 2024, SVD-LLM, section 3.1.
    """
    total_rows = sum(block.shape[0] for block in blocks)
    if not 1 <= rank <= total_rows:
        raise ValueError(f"rank {rank} is not between 1 and the stack's {total_rows} rows")
    weighted = [
        block if left_weights is None else left_weights[i].to(block.dtype) @ block for i, block in enumerate(blocks)
    ]
    stack = torch.cat(list(weighted))
    basis, energies = _left_singular(stack, second_moment, rank)
    basis = _canonical(basis, energies, rank)
    explained = float(energies[:rank].sum())
    lost = float(energies[rank:].sum())
    parts = basis.split([block.shape[0] for block in blocks])
    ups = [
        part if left_weights is None else torch.linalg.solve(left_weights[i].to(part.dtype), part)
        for i, part in enumerate(parts)
    ]
    scale = _unit_columns(ups, rank)
    return Factored((basis.mH @ stack) * scale[:, None], [up / scale for up in ups], explained, lost)


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """Add `damping` × the mean of the diagonal to the diagonal of a second moment (d̃, d̃)."""
    level = damping * second_moment.diagonal().mean()
    return second_moment + level * torch.eye(len(second_moment), dtype=second_moment.dtype)


def matrix_root(energy: Tensor, floor: float = 1e-8) -> Tensor:
    """Return the symmetric square root of a positive semi-definite (n, n), eigenvalues floored to stay invertible.

    `floor` is relative to the largest eigenvalue. An energy of zero gives the identity: heads that nothing reads can
    still be factored.
    """
    values, vectors = torch.linalg.eigh((energy + energy.mH) / 2)
    top = float(values[-1])
    if top <= 0:
        return torch.eye(len(energy), dtype=energy.dtype)
    root: Tensor = (vectors * values.clamp(min=floor * top).sqrt().to(vectors.dtype)) @ vectors.mH
    return root


def gram(stack: Tensor, second_moment: Tensor | None) -> Tensor:
    """Return stack Σ stackᴴ, (N, N), for a real Σ and a real or complex stack (N, d̃)."""
    if second_moment is None:
        return stack @ stack.mH
    if stack.is_complex():
        return torch.complex(stack.real @ second_moment, stack.imag @ second_moment) @ stack.mH
    return stack @ second_moment @ stack.mH


def _left_singular(stack: Tensor, second_moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Return X's left singular vectors (N, at least rank) and all its squared singular values (N,), descending."""
    rows, columns = stack.shape
    if rows > GRAM_ABOVE and rows > columns:
        return _by_columns(stack, second_moment, rank)
    if max(rows, columns) > GRAM_ABOVE:
        values, vectors = torch.linalg.eigh(_hermitian(gram(stack, second_moment)))
        return vectors.flip(-1), values.flip(-1).clamp(min=0)
    basis, singular, _ = torch.linalg.svd(_whitened(stack, second_moment), full_matrices=rows > columns)
    return basis, _padded(singular.square(), rows)


def _by_columns(stack: Tensor, second_moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Decompose the (d̃, d̃) Gram matrix of a tall stack; QR keeps directions of little energy orthonormal."""
    weighted = _whitened(stack, second_moment)
    values, vectors = torch.linalg.eigh(_hermitian(weighted.mH @ weighted))
    mode = "reduced" if rank <= stack.shape[1] else "complete"
    basis, _ = torch.linalg.qr(weighted @ vectors.flip(-1), mode=mode)
    return basis, _padded(values.flip(-1).clamp(min=0), stack.shape[0])


def _whitened(stack: Tensor, second_moment: Tensor | None) -> Tensor:
    return stack if second_moment is None else stack @ matrix_root(second_moment, floor=0.0).to(stack.dtype)


def _hermitian(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mH) / 2


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values.new_zeros(max(0, size - len(values)))])[:size]


def _unit_columns(ups: Sequence[Tensor], rank: int) -> Tensor:
    """Return each column's root energy over the stack against that of an identity spread over the blocks."""
    energy = torch.stack([up.abs().square().sum(0) for up in ups]).sum(0)
    rows = sum(up.shape[0] for up in ups)
    scale = (energy * rank / rows).sqrt()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _canonical(basis: Tensor, energies: Tensor, rank: int) -> Tensor:
    """Fix what the decomposition leaves open in the first `rank` vectors: phases, and the basis of a repeated value.

    Directions without energy stay as they are: nothing in the result depends on them.
    """
    top = float(energies[0])
    fixed = basis.clone()
    start = 0
    while start < rank and float(energies[start]) > CLUSTER * top:
        stop = start + 1
        while stop < basis.shape[1] and float(energies[stop - 1] - energies[stop]) <= CLUSTER * top:
            stop += 1
        if stop > start + 1:
            fixed[:, start:stop] = _span_basis(basis[:, start:stop])
        start = stop
    return _phase(fixed[:, :rank])


def _span_basis(span: Tensor) -> Tensor:
    """Return a basis that depends on the spanned space alone: pivoted Gram-Schmidt of its projector's columns."""
    coefficients = span.mH.clone()
    chosen = []
    for _ in range(span.shape[1]):
        norms = coefficients.abs().square().sum(0)
        pivot = int((norms >= norms.max() * (1 - 1e-6)).nonzero()[0])
        direction = coefficients[:, pivot] / coefficients[:, pivot].abs().square().sum().sqrt()
        chosen.append(span @ direction)
        coefficients = coefficients - torch.outer(direction, direction.conj() @ coefficients)
    return torch.stack(chosen, dim=1)


def _phase(vectors: Tensor) -> Tensor:
    """Multiply each column by a phase that makes its first entry of largest magnitude real and positive."""
    sizes = vectors.abs()
    first = (sizes >= sizes.max(0).values * (1 - 1e-6)).to(torch.int8).argmax(0)
    entries = vectors.gather(0, first[None])[0]
    return vectors * (entries.conj() / entries.abs())
