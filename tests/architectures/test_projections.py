"""Every packing of query, key and value rows splits into the same heads and joins back to the same bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import tiny_config, tiny_model
from tests.conversion.test_families import EXPANDED, TOKENS, load, request
from tests.oracle import pool_model
from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.projections import join, module_shape, modules_of, split
from uptrain.architectures.schema import Packing, Projections
from uptrain.conversion.run.convert import convert

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


@pytest.mark.parametrize("layout", [*LAYOUTS, IN_BLOCKS], ids=lambda one: f"{one.packing.value}-{one.transposed}")
@given(shapes, st.integers(0, 99))
def test_join_undoes_split(layout: Projections, shape: tuple[int, int, int, int], seed: int) -> None:
    groups, per_group, head_dim, hidden = shape
    if layout is IN_BLOCKS:
        groups, per_group = 4 * groups, 1
    spec = AttentionSpec(groups * per_group, groups, head_dim)
    tensors = random_tensors(layout, spec, hidden, seed)
    back = join(layout, spec, split(layout, spec, tensors))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)
        assert back[name].flags.c_contiguous


def stored_order(packing: Packing, groups: int, per_group: int) -> list[tuple[str, int]]:
    """Return which head each run of head_dim rows of a fused projection holds, in the order they are stored."""
    heads = groups * per_group
    if packing is Packing.CONCAT:
        return [
            *(("q", h) for h in range(heads)),
            *(("k", g) for g in range(groups)),
            *(("v", g) for g in range(groups)),
        ]
    if packing is Packing.GROUPED:
        order = []
        for group in range(groups):
            order += [("q", group * per_group + member) for member in range(per_group)]
            order += [("k", group), ("v", group)]
        return order
    quarter = heads // 4
    return [(part, block * quarter + head) for block in range(4) for part in "qvk" for head in range(quarter)]


@pytest.mark.parametrize("layout", [*LAYOUTS[1:], IN_BLOCKS], ids=lambda one: f"{one.packing.value}-{one.transposed}")
@given(shapes)
def test_every_row_belongs_to_the_head_that_the_packing_says(
    layout: Projections, shape: tuple[int, int, int, int]
) -> None:
    """By brute force, one row at a time, as GPT-2 and MPT, GPT-NeoX and Falcon, and CodeGen store them."""
    groups, per_group, head_dim, hidden = shape
    if layout is IN_BLOCKS:
        groups, per_group = 4 * groups, 1
    rows, bias, place = [], [], {}
    for part, head in stored_order(layout.packing, groups, per_group):
        for dim in range(head_dim):
            place[part, head, dim] = len(rows)
            rows.append([1000 * len(rows) + column for column in range(hidden)])
            bias.append(-len(rows))
    weight = np.array(rows, np.float32)
    stored = {"qkv.weight": weight.T if layout.transposed else weight, "qkv.bias": np.array(bias, np.float32)}
    heads = split(layout, AttentionSpec(groups * per_group, groups, head_dim), stored)
    for (part, head, dim), row in place.items():
        found = heads.part(part)
        assert found.weight[head, dim].tolist() == rows[row]
        assert found.bias is not None and found.bias[head, dim] == bias[row]
    assert sum(heads.part(part).weight.size for part in "qkv") == weight.size


@given(shapes)
def test_separate_rows_and_output_columns_are_each_head_s_in_turn(shape: tuple[int, int, int, int]) -> None:
    groups, per_group, head_dim, hidden = shape
    spec = AttentionSpec(groups * per_group, groups, head_dim)
    stored = random_tensors(LAYOUTS[0], spec, hidden, 0)
    heads = split(LAYOUTS[0], spec, stored)
    for part, count in (("q", groups * per_group), ("k", groups), ("v", groups)):
        for head in range(count):
            row = stored[f"{part}_proj.weight"][head * head_dim : (head + 1) * head_dim]
            np.testing.assert_array_equal(heads.part(part).weight[head], row)
    for head in range(groups * per_group):
        columns = stored["o_proj.weight"][:, head * head_dim : (head + 1) * head_dim]
        np.testing.assert_array_equal(heads.part("o").weight[:, head], columns)


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


STORED_AS = {
    "llama": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "gpt2": ("n_embd", "n_layer", "n_head"),
    "mpt": ("d_model", "n_layers", "n_heads"),
    "phi3": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "bloom": ("hidden_size", "n_layer", "n_head"),
    "gpt_neox": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    EXPANDED: ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "codegen": ("n_embd", "n_layer", "n_head"),
}
"""A family of each packing with what its config calls its sizes: separate, concatenated, grouped, in blocks."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", STORED_AS)
@given(
    st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3]), st.sampled_from([4, 8, 12]), st.integers(1, 3),
    st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_models_of_any_shape_convert_to_the_pooled_source(
    model_type: str, kept: int, pooled: int, head_dim: int, layers: int, seed: int
) -> None:
    """Whatever the numbers of heads, groups, dims and layers: logits are transformers' own with pooled heads."""
    heads = kept * pooled
    if model_type == "codegen":  # the oracle pools through views, and blocks of more than one head have none
        heads, kept = 4, 2 ** (kept - 1)
    sizes = dict(zip(STORED_AS[model_type], (heads * head_dim, layers, heads), strict=True))
    rotary = {"rotary_dim": head_dim} if model_type == "codegen" else {}
    source = heads if model_type in ("llama", "phi3", EXPANDED) else None
    model = tiny_model(tiny_config(model_type, source, **sizes, **rotary, initializer_range=0.08), seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/src")
        convert(f"{folder}/src", f"{folder}/out", request(kept))
        found = load(Path(folder) / "out")
    with torch.no_grad():
        wanted = pool_model(model, kept)(TOKENS).logits
        torch.testing.assert_close(found(TOKENS).logits, wanted, atol=1e-5, rtol=1e-5)
