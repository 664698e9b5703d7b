"""The share of a layer's key and value energy that pooling and the factorisation explain, in numpy.

A conversion measures a layer with it without importing torch, which would cost more than converting. The same measure
compares two heads.

Energy is the squared Frobenius norm of the stacked heads, biases included.

Source: Eckart & Young 1936, "The approximation of one matrix by another of lower rank".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from uptrain.architectures.projections import Heads
from uptrain.checkpoint.dtypes import Array, as_float32

Floats = npt.NDArray[np.floating]
EXACT_ROWS = 1024
"""Stacked rows up to which all singular values are computed; above, subspace iteration gives the leading ones."""


def rows_of(heads: Heads) -> npt.NDArray[np.float32]:
    """Return the heads' maps of [x; 1] in float32, (heads, head_dim, hidden_size + 1)."""
    weight = as_float32(heads.weight)
    bias = np.zeros(weight.shape[:2], np.float32) if heads.bias is None else as_float32(heads.bias)
    return np.concatenate([weight, bias[..., None]], axis=2)


def rows_by_group(heads: Heads, groups: int) -> Iterator[Floats]:
    """Yield `rows_of` the heads of each of `groups` groups: those of a whole large layer would take half a gigabyte."""
    size = len(heads.weight) // groups
    for start in range(0, len(heads.weight), size):
        bias = None if heads.bias is None else heads.bias[start : start + size]
        yield rows_of(Heads(heads.weight[start : start + size], bias))


def explained_by_mean(rows: Floats, groups: int) -> float:
    """Return the share of the energy of `rows` (heads, D, d̃) that the averages of `groups` groups explain."""
    runs = rows.reshape(groups, -1, *rows.shape[1:])
    lost = np.square(runs - runs.mean(1, keepdims=True)).sum(dtype=np.float64)
    return 1 - float(lost / energy(rows))


def explained_by_factor(rows: Floats, groups: int) -> float:
    """Return the share of energy that the best D shared rows per group explain, for unrotated `rows` (heads, D, d̃)."""
    runs = rows.reshape(groups, -1, rows.shape[2])
    return sum(_leading(run, rows.shape[1]) for run in runs) / energy(rows)


def explained_by_phases(rows: Floats, groups: int, interleaved: bool, dims: int) -> float:
    """Return the share of energy that shared rows explain, for keys whose first `dims` dims are rotated.

    A group shares one complex row per rotary pair. The other dims are as free as without rotation.

    - `rows`: (heads, D, d̃).
    - `groups`: how many groups the heads form.
    - `interleaved`: whether a pair is two neighbouring dims, instead of one of each half.
    - `dims`: how many dims are rotated.
    """
    rotated, free, half = rows[:, :dims], rows[:, dims:], dims // 2
    real, imaginary = (rotated[:, ::2], rotated[:, 1::2]) if interleaved else (rotated[:, :half], rotated[:, half:])
    pairs = (real + 1j * imaginary).reshape(groups, -1, half, rows.shape[2]).transpose(0, 2, 1, 3)
    grams = pairs @ pairs.conj().swapaxes(2, 3)
    explained = float(np.linalg.eigvalsh(grams)[..., -1].sum(dtype=np.float64))
    if dims < rows.shape[1]:
        explained += explained_by_factor(free, groups) * energy(free)
    return explained / energy(rows)


def cost(heads: int, head_dim: int, hidden_size: int) -> float:
    """Return about how many multiplications `explained_by_factor` of `heads` heads takes, for keys and for values."""
    stacked = heads * head_dim
    return 2.0 * stacked * (hidden_size + 1) * (stacked if stacked <= EXACT_ROWS else 8 * (head_dim + 32))


def energy(rows: Array) -> float:
    """Return the energy of `rows`, and 1 where it is 0, so that every share of it is a number."""
    return float(np.square(rows).sum(dtype=np.float64)) or 1.0


def _leading(stack: Floats, rank: int) -> float:
    """Return the energy of the `rank` leading singular values of `stack` (n, d̃); a lower bound when it is large."""
    if rank >= len(stack):
        return energy(stack)
    if len(stack) <= EXACT_ROWS:
        return float(np.linalg.eigvalsh(stack @ stack.T)[-rank:].sum(dtype=np.float64))
    basis = stack @ np.random.default_rng(0).standard_normal((stack.shape[1], rank + 32), dtype=np.float32)
    for _ in range(3):
        basis = stack @ (stack.T @ np.linalg.qr(basis)[0])
    found = np.linalg.svd(np.linalg.qr(basis)[0].T @ stack, compute_uv=False)
    return float(np.square(found[:rank]).sum(dtype=np.float64))


def pair_similarity(rows: Floats, explained: Callable[[Floats], float]) -> npt.NDArray[np.float32]:
    """Return (heads, heads): the share of two heads' energy that one shared head explains, from rows (heads, D, d̃).

    `explained` returns it for two heads' rows (2, D, d̃). Equal heads give 1. Heads of the same energy that have nothing
    in common give a half.
    """
    heads = len(rows)
    out = np.ones((heads, heads), np.float32)
    for one in range(heads):
        for other in range(one):
            out[one, other] = out[other, one] = explained(rows[[one, other]])
    return out


def spectrum(rows: Floats) -> npt.NDArray[np.float64]:
    """Return the singular values of the stacked heads (heads, D, d̃), descending; float64."""
    stack = rows.reshape(-1, rows.shape[2]).astype(np.float64)
    # The Gram matrix of the shorter side takes a fraction of the time, and no picture shows its small errors.
    gram = stack @ stack.T if len(stack) <= stack.shape[1] else stack.T @ stack
    found: npt.NDArray[np.float64] = np.sqrt(np.linalg.eigvalsh(gram)[::-1].clip(min=0))
    return found
