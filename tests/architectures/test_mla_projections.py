"""Every target class's modules hold the latent they were joined from, and compute what it computes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.mla_projections import (
    NEUTRAL_EPS,
    LatentHeads,
    MLASchema,
    MLAStorage,
    join_latent,
    latent_shapes,
)
from uptrain.checkpoint.dtypes import Array
from uptrain.models.mla_targets import MLA_TARGET_CLASSES

SCHEMAS = {name: entry.schema for name, entry in MLA_TARGET_CLASSES.items()}
SCHEMAS["re-rotate"] = MLASchema(per_query=False)
HIDDEN, HEAD_DIM, TOKENS = 7, 4, 5
sizes = st.fixed_dictionaries(
    {
        "groups": st.integers(1, 3),
        "per_group": st.integers(1, 3),
        "nope": st.integers(0, 4),
        "pairs": st.integers(0, 3),
        "rank": st.integers(1, 6),
        "value": st.integers(1, 4),
        "biased": st.booleans(),
        "seed": st.integers(0, 99),
    }
).filter(lambda size: size["nope"] + size["pairs"] > 0)


def random_heads(size: Mapping[str, int], biased: bool) -> LatentHeads:
    heads, groups, rope = size["groups"] * size["per_group"], size["groups"], 2 * size["pairs"]
    generator = np.random.default_rng(size["seed"])

    def draw(*shape: int) -> Array:
        return generator.standard_normal(shape)

    maps = LatentHeads(
        draw(heads, size["nope"], HIDDEN), draw(heads, rope, HIDDEN), draw(size["rank"], HIDDEN), draw(rope, HIDDEN),
        draw(groups, size["nope"], size["rank"]), draw(groups, size["value"], size["rank"]),
        draw(HIDDEN, heads, size["value"]),
    )  # fmt: skip
    if not biased:
        return maps
    bias = {
        "q_nope_bias": draw(heads, size["nope"]), "q_rope_bias": draw(heads, rope),
        "down_bias": draw(size["rank"]), "k_rope_bias": draw(rope), "o_bias": draw(HIDDEN),
    }  # fmt: skip
    return LatentHeads(**{**vars(maps), **bias})


def spec_of(size: Mapping[str, int], schema: MLASchema) -> AttentionSpec:
    heads = size["groups"] * size["per_group"]
    return AttentionSpec(
        heads, heads if schema.per_query else size["groups"], HEAD_DIM, size["value"], size["rank"], 2 * size["pairs"],
        size["nope"],
    )  # fmt: skip


def linear(tensors: Mapping[str, Array], module: str, x: Array, transposed: bool = False) -> Array:
    weight = tensors[f"{module}.weight"]
    return x @ (weight if transposed else weight.T) + tensors.get(f"{module}.bias", 0)


def norm(tensors: Mapping[str, Array], module: str, x: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + NEUTRAL_EPS) * tensors[f"{module}.weight"]


def of_target_class(
    tensors: Mapping[str, Array], schema: MLASchema, size: Mapping[str, int], x: Array
) -> tuple[Array, Array]:
    """Return logits (H, T, T) and output (T, out) as a target class's own forward gives them, rotation left out."""
    nope, rope = size["nope"], 2 * size["pairs"]
    heads = size["groups"] * size["per_group"]
    if "q_a_proj.weight" in tensors:
        query = linear(tensors, "q_b_proj", norm(tensors, "q_a_layernorm", linear(tensors, "q_a_proj", x)))
    else:
        query = linear(tensors, "q_proj", x)
    latent, shared = np.split(linear(tensors, "kv_a_proj_with_mqa", x), [size["rank"]], axis=1)
    if schema.neutral:
        latent = norm(tensors, "kv_a_layernorm", latent)
    expanded = linear(tensors, "kv_b_proj", latent).reshape(TOKENS, -1, nope + size["value"])
    expanded = np.repeat(expanded, heads // expanded.shape[1], axis=1)
    key = np.concatenate([expanded[..., :nope], np.broadcast_to(shared[:, None], (TOKENS, heads, rope))], axis=2)
    scale = (nope + rope) ** -0.5 if schema.fold_scale else HEAD_DIM**-0.5
    logits = np.einsum("thn,shn->hts", query.reshape(TOKENS, heads, -1), key) * scale
    mixed = np.einsum("hts,shv->thv", logits, expanded[..., nope:]).reshape(TOKENS, -1)
    return logits, linear(tensors, schema.output, mixed, schema.output_transposed)


def meant(heads: LatentHeads, x: Array) -> tuple[Array, Array]:
    """Return the same from the heads themselves, with the source's scale."""

    def project(weight: Array, bias: Array | None) -> Array:
        return np.einsum("td,...nd->...tn", x, weight) + (0 if bias is None else bias[..., None, :])

    per = len(heads.q_nope) // len(heads.k_up)
    latent, shared = project(heads.down, heads.down_bias), project(heads.k_rope, heads.k_rope_bias)
    key, value = (np.repeat(np.einsum("tr,gnr->gtn", latent, up), per, axis=0) for up in (heads.k_up, heads.v_up))
    logits = np.einsum("htn,hsn->hts", project(heads.q_nope, heads.q_nope_bias), key)
    logits = logits + np.einsum("htn,sn->hts", project(heads.q_rope, heads.q_rope_bias), shared)
    logits = logits * HEAD_DIM**-0.5
    output = np.einsum("hts,hsv,ohv->to", logits, value, heads.o)
    return logits, output + (0 if heads.o_bias is None else heads.o_bias)


@pytest.mark.parametrize("name", SCHEMAS)
@given(size=sizes)
def test_a_target_class_computes_what_the_heads_mean(name: str, size: Mapping[str, int]) -> None:
    schema = SCHEMAS[name]
    heads = random_heads(size, bool(size["biased"]) and not schema.neutral)
    x = np.random.default_rng(1).standard_normal((TOKENS, HIDDEN))
    for q_lora_rank in (None, HIDDEN) if schema.neutral else (None,):
        tensors = join_latent(heads, MLAStorage(schema, q_lora_rank=q_lora_rank), HEAD_DIM)
        for found, wanted in zip(of_target_class(tensors, schema, size, x), meant(heads, x), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9 * (1 + np.abs(wanted).max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
@given(size=sizes, scale=st.sampled_from([1.0, 0.25]), low=st.booleans())
def test_the_plan_s_shapes_are_those_of_the_tensors(
    name: str, size: Mapping[str, int], scale: float, low: bool
) -> None:
    schema = SCHEMAS[name]
    biased = bool(size["biased"]) and not schema.neutral
    heads = random_heads(size, biased)
    rank = min(3, len(heads.q_nope) * (size["nope"] + 2 * size["pairs"])) if low and schema.neutral else None
    stored = MLAStorage(schema, scale, rank)
    tensors = join_latent(heads, stored, HEAD_DIM)
    shapes = latent_shapes(stored, spec_of(size, schema), HIDDEN, biased, heads.o_bias is not None)
    assert {key: tensor.shape for key, tensor in tensors.items()} == shapes


@given(size=sizes)
def test_the_output_scale_multiplies_weight_and_bias_and_nothing_else(size: Mapping[str, int]) -> None:
    heads = random_heads(size, True)
    plain = join_latent(heads, MLAStorage(MLASchema()), HEAD_DIM)
    scaled = join_latent(heads, MLAStorage(MLASchema(), 0.5), HEAD_DIM)
    for name, tensor in plain.items():
        np.testing.assert_array_equal(scaled[name], tensor * (0.5 if name.startswith("o_proj") else 1))


def test_low_rank_queries_are_the_nearest_of_that_rank() -> None:
    size = {"groups": 2, "per_group": 1, "nope": 4, "pairs": 1, "rank": 3, "value": 2, "seed": 0}
    heads, schema = random_heads(size, False), SCHEMAS["deepseek_v3"]
    query = join_latent(heads, MLAStorage(schema), HEAD_DIM)["q_proj.weight"]
    for rank in (1, 4, 6):
        tensors = join_latent(heads, MLAStorage(schema, q_lora_rank=rank), HEAD_DIM)
        gain = tensors["q_a_layernorm.weight"] / NEUTRAL_EPS**0.5
        found = (tensors["q_b_proj.weight"] * gain) @ tensors["q_a_proj.weight"]
        left = np.linalg.svd(query, compute_uv=False)[rank:]
        assert np.linalg.norm(query - found) == pytest.approx(np.linalg.norm(left), rel=1e-9)
