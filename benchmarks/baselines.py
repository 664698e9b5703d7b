"""Pooling methods of the literature, kept to be measured against: renormed mean and generalised Procrustes."""

from __future__ import annotations

import torch
from torch import Tensor

from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.low_rank import gram
from uptrain.methods.rotary import Rotary, apply_factor, to_complex

ROUNDS = 20
"""Alternations of generalised Procrustes analysis; it converges in a handful."""


def mean_renormed(layer: HeadMaps, groups: int, second_moment: Tensor | None) -> HeadMaps:
    """Average each group's keys and values, then restore their mean energy: E‖k'‖² = mean_g E‖k_g‖².

    Averaging m unaligned heads shrinks them by about 1/√m, which flattens attention.
    """
    return layer.with_rows(
        k_rows=_renormed(layer.k_rows, groups, second_moment), v_rows=_renormed(layer.v_rows, groups, second_moment)
    )


def procrustes(
    layer: HeadMaps, groups: int, position: Rotary | None, second_moment: Tensor | None, renorm: bool = False
) -> HeadMaps:
    """Rotate each group's heads onto their mean before averaging, and undo the rotations in q and o.

    Rotated keys may only turn by a phase a frequency, free keys and values by any orthogonal matrix.
    Source: Gower 1975, Generalized Procrustes analysis, section 3; for attention heads Jin et al. 2024, "Align
    attention heads before merging them", section 3.2.
    """
    size = layer.kv_heads // groups
    keys, queries, values, outputs = layer.k_rows, layer.q_rows, layer.v_rows, layer.o.clone()
    per = layer.queries_per_kv
    if position is not None:
        phases = _phases(to_complex(keys, position), size, second_moment)
        keys = apply_factor(keys, position, phases)
        queries = apply_factor(queries, position, phases.repeat_interleave(per, 0))
    free = slice(0 if position is None else position.dims, None)
    if keys[:, free].shape[1]:
        turns = _rotations(keys[:, free], size, second_moment)
        keys, queries = keys.clone(), queries.clone()
        keys[:, free] = turns @ keys[:, free]
        queries[:, free] = turns.repeat_interleave(per, 0) @ queries[:, free]
    turns = _rotations(values, size, second_moment)
    outputs = torch.einsum("ohv,hwv->ohw", outputs, turns.repeat_interleave(per, 0))
    aligned = layer.with_rows(q_rows=queries, k_rows=keys, v_rows=turns @ values, o=outputs)
    if renorm:
        return mean_renormed(aligned, groups, second_moment)
    return aligned.with_rows(
        k_rows=aligned.k_rows.unflatten(0, (groups, size)).mean(1),
        v_rows=aligned.v_rows.unflatten(0, (groups, size)).mean(1),
    )


def _renormed(rows: Tensor, groups: int, second_moment: Tensor | None) -> Tensor:
    grouped = rows.unflatten(0, (groups, len(rows) // groups))
    mean: Tensor = grouped.mean(1)
    for g in range(groups):
        before = torch.stack([gram(block, second_moment).trace() for block in grouped[g]]).mean()
        mean[g] *= (before / gram(mean[g], second_moment).trace()).sqrt()
    return mean


def _phases(pairs: Tensor, size: int, second_moment: Tensor | None) -> Tensor:
    """Return unit phases (heads, pairs) that turn each head's pairs onto their group's mean."""
    phases = torch.ones(pairs.shape[:2], dtype=pairs.dtype)
    for start in range(0, len(pairs), size):
        for pair in range(pairs.shape[1]):
            products = gram(pairs[start : start + size, pair], second_moment)
            phase = phases[start : start + size, pair].clone()
            for _ in range(ROUNDS):
                toward = (products @ phase.conj()).conj()
                phase = torch.where(toward.abs() > 0, toward / toward.abs(), phase)
            phases[start : start + size, pair] = phase
    return phases


def _rotations(rows: Tensor, size: int, second_moment: Tensor | None) -> Tensor:
    """Return orthogonal matrices (heads, D, D) that turn each head's rows (heads, D, d̃) onto their group's mean."""
    turns = torch.eye(rows.shape[1], dtype=rows.dtype).repeat(len(rows), 1, 1)
    for start in range(0, len(rows), size):
        group = range(start, start + size)
        for _ in range(ROUNDS):
            mean = torch.stack([turns[g] @ rows[g] for g in group]).mean(0)
            weighted = mean if second_moment is None else mean @ second_moment
            for g in group:
                left, _, right = torch.linalg.svd(weighted @ rows[g].mT)
                turns[g] = left @ right
    return turns
