"""Pooling, against plain float64 averages; and Ainslie's degroup-then-mean identity."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.projections import Heads, LayerHeads
from uptrain.architectures.schema import Position
from uptrain.methods import METHODS
from uptrain.methods.method import LayerContext
from uptrain.methods.pooling import first, fresh, mean

sizes = st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))


def heads_of(size: tuple[int, int, int, int, int], dtype: type = np.float32) -> tuple[int, np.ndarray]:
    groups, per_group, head_dim, hidden, seed = size
    shape = (groups * per_group, head_dim, hidden)
    return groups, np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@given(sizes, st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
def test_mean_is_the_float64_average_of_each_run(size: tuple[int, int, int, int, int], dtype: type) -> None:
    groups, heads = heads_of(size, dtype)
    expected = np.stack([run.astype(np.float64).mean(0) for run in np.split(heads, groups)])
    assert mean(heads, groups).dtype == np.float32
    np.testing.assert_allclose(mean(heads, groups), expected, atol=1e-6)


@given(sizes)
def test_mean_of_repeated_heads_gives_the_heads_back_exactly(size: tuple[int, int, int, int, int]) -> None:
    """A GQA model with its heads written out is its own mean: powers of two and odd counts alike, in bfloat16."""
    groups, per_group, head_dim, hidden, seed = size
    _, shared = heads_of((groups, 1, head_dim, hidden, seed), ml_dtypes.bfloat16)
    pooled = mean(shared.repeat(per_group, axis=0), groups).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(pooled, shared)


@given(sizes)
def test_first_is_every_run_s_first(size: tuple[int, int, int, int, int]) -> None:
    groups, heads = heads_of(size)
    np.testing.assert_array_equal(first(heads, groups), np.stack([run[0] for run in np.split(heads, groups)]))


def test_random_heads_repeat_by_seed_and_differ_by_layer_and_part() -> None:
    one = fresh((2, 8, 64), 0.02, seed=3, layer=1, part="k")
    np.testing.assert_array_equal(one, fresh((2, 8, 64), 0.02, seed=3, layer=1, part="k"))
    for other in ((4, 1, "k"), (3, 2, "k"), (3, 1, "v")):
        assert not np.array_equal(one, fresh((2, 8, 64), 0.02, *other))
    assert one.std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_queries_and_output_stay_and_biases_follow(method: str) -> None:
    generator = np.random.default_rng(0)

    def part(*shape: int) -> Heads:
        return Heads(generator.standard_normal(shape), generator.standard_normal(shape[:2]))

    layer = LayerHeads(part(8, 4, 16), part(8, 4, 16), part(8, 4, 16), part(16, 8, 4))
    context = LayerContext(index=0, position=Position.ABSOLUTE, spec=AttentionSpec(8, 8, 4))
    convert = METHODS[method].convert
    assert convert is not None
    out = convert(layer, 2, context).layer
    assert out.q is layer.q and out.o is layer.o
    assert out.part("k").weight.shape == (2, 4, 16)
    assert out.part("v").bias is not None and out.part("v").bias.shape == (2, 4)
