"""The shares that a summary names equal those of the factorisation itself, computed apart in float64 by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uptrain.methods import energy_numpy
from uptrain.methods.head_maps import HeadMaps
from uptrain.methods.rotary import Rotary
from uptrain.methods.shared_heads import factor_heads

sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(3, 20), st.integers(0, 999))


@given(sizes, st.integers(0, 3), st.sampled_from(["none", "half", "interleaved"]))
def test_shares_equal_the_factorisation_s(size: tuple[int, int, int, int, int], free: int, layout: str) -> None:
    groups, per_group, pairs, hidden, seed = size
    generator, heads, dims = torch.Generator().manual_seed(seed), groups * per_group, 2 * pairs + free
    k, v, q = (torch.randn(heads, dims, hidden, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(heads, dims, generator=generator, dtype=torch.float64)
    layer = HeadMaps(q, k, v, torch.randn(hidden, heads, dims, dtype=torch.float64), bias, bias, None)
    position = None if layout == "none" else Rotary("half" if layout == "half" else "interleaved", 2 * pairs)
    kept = factor_heads(layer, groups, position).explained
    keys, values = layer.k_rows.float().numpy(), layer.v_rows.float().numpy()
    if position is None:
        found = energy_numpy.explained_by_factor(keys, groups)
    else:
        found = energy_numpy.explained_by_phases(keys, groups, layout == "interleaved", 2 * pairs)
    assert found == pytest.approx(kept["svd"].keys, abs=1e-4)
    assert energy_numpy.explained_by_factor(values, groups) == pytest.approx(kept["svd"].values, abs=1e-4)
    assert energy_numpy.explained_by_mean(keys, groups) == pytest.approx(kept["mean"].keys, abs=1e-4)
    assert energy_numpy.explained_by_mean(values, groups) == pytest.approx(kept["mean"].values, abs=1e-4)


def test_the_leading_values_of_a_large_stack_are_found_without_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    spectrum = np.exp(-np.arange(200) / 40).astype(np.float32)
    left = np.linalg.qr(generator.standard_normal((400, 200)))[0]
    rows = ((left * spectrum) @ generator.standard_normal((200, 150))).astype(np.float32).reshape(8, 50, 150)
    exact = energy_numpy.explained_by_factor(rows, 1)
    monkeypatch.setattr(energy_numpy, "EXACT_ROWS", 100)
    assert exact * 0.999 < energy_numpy.explained_by_factor(rows, 1) <= exact + 1e-5
