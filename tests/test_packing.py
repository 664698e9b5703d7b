"""Every packing of query, key and value rows splits into the same heads and joins back to the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uptrain.attention import AttentionSpec
from uptrain.layout import Packing, Projections
from uptrain.packing import join, module_shape, modules_of, split

LAYOUTS = [
    Projections(),
    Projections(fused="qkv", packing=Packing.CONCAT),
    Projections(fused="qkv", packing=Packing.CONCAT, transposed=True),
    Projections(fused="qkv", packing=Packing.GROUPED),
]
IN_BLOCKS = Projections(fused="qkv", packing=Packing.BLOCKS)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))


def random_tensors(layout: Projections, spec: AttentionSpec, hidden: int, seed: int) -> dict[str, np.ndarray]:
    generator, out = np.random.default_rng(seed), {}
    for name in modules_of(layout, frozenset("qkvo")):
        shape = module_shape(layout, spec, name, hidden)
        out[f"{name}.weight"] = generator.standard_normal(shape, dtype=np.float32)
        out[f"{name}.bias"] = generator.standard_normal(shape[1 if layout.transposed else 0], dtype=np.float32)
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.packing.value}-{layout.transposed}")
@given(shapes, st.integers(0, 99))
def test_join_undoes_split(layout: Projections, shape: tuple[int, int, int, int], seed: int) -> None:
    groups, per_group, head_dim, hidden = shape
    spec = AttentionSpec(groups * per_group, groups, head_dim)
    tensors = random_tensors(layout, spec, hidden, seed)
    back = join(layout, spec, split(layout, spec, tensors))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
        assert back[name].flags.c_contiguous


@given(shapes)
def test_grouped_rows_are_each_group_s_queries_then_its_key_then_its_value(shape: tuple[int, int, int, int]) -> None:
    """By brute force, as gpt_neox, bloom and falcon store them."""
    groups, per_group, head_dim, hidden = shape
    spec, rows, expected = AttentionSpec(groups * per_group, groups, head_dim), [], {"q": [], "k": [], "v": []}
    for _group in range(groups):
        for kind in ["q"] * per_group + ["k", "v"]:
            head = np.full((head_dim, hidden), len(rows), np.float32)
            rows.append(head)
            expected[kind].append(head)
    heads = split(LAYOUTS[3], spec, {"qkv.weight": np.concatenate(rows)})
    for part in "qkv":
        np.testing.assert_array_equal(heads.part(part).weight, np.stack(expected[part]))


@given(shapes, st.integers(0, 99))
def test_blocks_of_query_value_key_split_and_join(shape: tuple[int, int, int, int], seed: int) -> None:
    """By brute force, as codegen stores them: a quarter of the heads a block."""
    quarter, _, head_dim, hidden = shape
    spec, rows, expected = AttentionSpec(4 * quarter, 4 * quarter, head_dim), [], {"q": [], "k": [], "v": []}
    for _block in range(4):
        for kind in "qvk":
            for _head in range(quarter):
                rows.append(np.full((head_dim, hidden), len(rows), np.float32))
                expected[kind].append(rows[-1])
    stored = random_tensors(IN_BLOCKS, spec, hidden, seed)
    heads = split(IN_BLOCKS, spec, {**stored, "qkv.weight": np.concatenate(rows)})
    for part in "qkv":
        np.testing.assert_array_equal(heads.part(part).weight, np.stack(expected[part]))
    back = join(IN_BLOCKS, spec, split(IN_BLOCKS, spec, stored))
    assert all(np.array_equal(back[name], stored[name]) for name in stored)


@given(shapes, st.integers(0, 99))
def test_repacking_keeps_the_heads(shape: tuple[int, int, int, int], seed: int) -> None:
    groups, per_group, head_dim, hidden = shape
    spec = AttentionSpec(groups * per_group, groups, head_dim)
    heads = split(LAYOUTS[0], spec, random_tensors(LAYOUTS[0], spec, hidden, seed))
    for layout in LAYOUTS[1:]:
        other = split(layout, spec, join(layout, spec, heads))
        for part in "qkvo":
            np.testing.assert_array_equal(other.part(part).weight, heads.part(part).weight)
            np.testing.assert_array_equal(other.part(part).bias, heads.part(part).bias)
