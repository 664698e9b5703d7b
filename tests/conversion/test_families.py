"""Every family of the table, against transformers' own module: add an entry, and this file proves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, DynamicCache, EncoderDecoderCache, PreTrainedModel

from tests.conftest import tiny_config, tiny_model
from tests.oracle import computed_heads, pool_model
from uptrain.architectures.attention import AttentionSpec, cache_bytes_per_token, cross_bytes_per_token
from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.description import ModelDescription, describe_checkpoint
from uptrain.architectures.projections import Heads, join, modules_of, split
from uptrain.architectures.schema import Family, Sliding
from uptrain.checkpoint.reader import open_checkpoint, read_config
from uptrain.cli.app import run
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.plan.planner import result_attention
from uptrain.conversion.request import Request
from uptrain.errors import UsageError
from uptrain.evaluation.reading import cache_of, with_cache
from uptrain.models.auto_class import auto_class_of
from uptrain.models.register import register
from uptrain.models.targets import TARGET_CLASSES


def family(name: str) -> Family:
    return FAMILIES[name.partition("+")[0]]


register()
RESULTS = {"gpt_bigcode", *(target.name for target in TARGET_CLASSES.values() if target.remote_code)}
FAMILY_NAMES = [name for name, entry in FAMILIES.items() if name not in RESULTS and not entry.keys.latent]
EXPANDED = "falcon+new_decoder_architecture+parallel_attn"
"""Its class caches a copy of keys and values for every query head, whatever their number."""
VARIANTS = [
    "phi+qk_layernorm", "stablelm+qk_layernorm", "cohere+use_qk_norm", "falcon+parallel_attn", "falcon+alibi", EXPANDED,
    "gpt_neox+no_use_parallel_residual", "gpt2+scale_attn_by_inverse_layer_idx",
    "persimmon+qk_layernorm",
]  # fmt: skip
SOURCES = [*FAMILY_NAMES, *VARIANTS]
UNGROUPED = ["falcon", "falcon+parallel_attn", "falcon+alibi"]
TARGETS = (
    [(name, 4, 1) for name in SOURCES]
    + [(name, 4, 2) for name in SOURCES if name not in UNGROUPED]
    + [(name, 2, 1) for name in SOURCES if family(name).native and name not in UNGROUPED]
)
TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]])
Save = Callable[..., Path]


def request(groups: int, method: str = "mean") -> Request:
    return Request("mqa" if groups == 1 else "gqa", None if groups == 1 else groups, method)


def load(folder: Path) -> PreTrainedModel:
    """Load a model whose class finds every tensor it has, in its shape, and no other."""
    model, info = auto_class_of(read_config(folder)).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def read(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a model, or the encoder it has, is given to read: `ids`, or as many sounds."""
    if model.main_input_name == "input_ids":
        return {"input_ids": ids}
    shape = (len(ids), model.config.num_mel_bins, 2 * model.config.max_source_positions)
    return {model.main_input_name: torch.randn(shape, generator=torch.manual_seed(2))}


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return a model's logits of TOKENS; an encoder reads them backwards beforehand, where there is one."""
    if model.config.is_encoder_decoder:
        return model(**read(model, TOKENS.flip(1)), decoder_input_ids=TOKENS).logits
    return model(TOKENS).logits


def attention_of(model_type: str, config: dict[str, Any]) -> tuple[AttentionSpec, ...]:
    return ModelDescription(family=FAMILIES[model_type], config=config, name="src").attention


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_defaults_are_the_config_class_own(model_type: str) -> None:
    entry, config = FAMILIES[model_type], CONFIG_MAPPING[model_type]()
    assert {key: getattr(config, key) for key in entry.defaults} == dict(entry.defaults)
    rotary = getattr(config, "rope_parameters", None) or {}
    assert rotary.get("partial_rotary_factor", 1) == entry.partial_rotary_factor


@pytest.mark.parametrize("model_type", [name for name in FAMILY_NAMES if FAMILIES[name].sliding is not Sliding.NEVER])
def test_windows_are_the_class_own_where_the_config_does_not_list_them(model_type: str) -> None:
    settings = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3, "layer_types": None}
    own = tiny_config(model_type, num_hidden_layers=8, **settings)
    silent = {key: value for key, value in own.to_dict().items() if key not in ("layer_types", "no_rope_layers")}
    kinds = getattr(own, "layer_types", None) or ["sliding_attention"] * 8
    found = [spec.sliding_window for spec in attention_of(model_type, silent)]
    assert found == [8 if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize("model_type", [name for name in FAMILY_NAMES if FAMILIES[name].partial_rotary_factor < 1])
@pytest.mark.parametrize("said", [{}, {"partial_rotary_factor": 0.4}], ids=["silent", "said"])
def test_rotated_dims_of_an_older_config_are_the_class_own(model_type: str, said: dict[str, float]) -> None:
    """Before transformers 5 the share of rotated dims stood beside the rotary parameters."""
    sizes = {"hidden_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 40}
    parameters = CONFIG_MAPPING[model_type](**sizes, **said, rope_theta=10_000.0).rope_parameters
    config = {**sizes, **said, "rope_theta": 10_000.0, "rope_scaling": None}
    spec = attention_of(model_type, config)[0]
    assert spec.rotary_ndims == int(40 * parameters["partial_rotary_factor"])


@pytest.mark.parametrize("model_type", SOURCES)
def test_class_name_is_what_transformers_writes(model_type: str, save_tiny: Save) -> None:
    config = open_checkpoint(save_tiny(model_type)).config
    assert config["architectures"] == [family(model_type).class_name]


@pytest.mark.parametrize("model_type", SOURCES)
def test_split_rows_are_the_heads_the_module_computes(model_type: str, save_tiny: Save) -> None:
    """q, k and v of our heads equal what the module's own projections give, and what it puts into its cache."""
    folder = save_tiny(model_type)
    entry, checkpoint, model = family(model_type), open_checkpoint(folder), load(folder)
    second = len(entry.attentions)  # the second layer's own
    source = describe_checkpoint(checkpoint, "src")
    spec, base = source.attention[second], source.attention_name(second)
    names = [f"{m}.{kind}" for m in modules_of(entry.projections, frozenset("qkvo")) for kind in ("weight", "bias")]
    tensors = {name: checkpoint.read(base + name) for name in names if base + name in checkpoint.tensors}
    heads = split(entry.projections, spec, tensors)

    back = join(entry.projections, spec, heads)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)

    x = torch.randn(5, 48, generator=torch.manual_seed(1))
    computed = computed_heads(model.get_submodule(base.rstrip(".")), x)
    for part in "qkv":
        ours = heads.part(part)
        np.testing.assert_allclose(outputs_of(ours, x), computed[part].detach().numpy(), atol=2e-5)
    x, cached = seen_and_cached(model, base.rstrip("."), 1)
    for part in "kv":
        np.testing.assert_allclose(outputs_of(heads.part(part), x), cached[part], atol=2e-5)


def outputs_of(heads: Heads, x: torch.Tensor) -> np.ndarray:
    """Return what heads make of x (T, d): (T, heads, head_dim)."""
    return np.einsum("td,hed->the", x.numpy(), heads.weight) + (0 if heads.bias is None else heads.bias)


@torch.no_grad()
def seen_and_cached(model: PreTrainedModel, name: str, layer: int) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Return five inputs of an attention module (5, d), and the keys and values it caches of each, by head.

    Each is a first token, at which no rotation turns; norms on queries and keys are taken out.
    """
    module, seen = model.get_submodule(name), []
    for norm in ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"):
        if hasattr(module, norm):
            setattr(module, norm, torch.nn.Identity())
    module.register_forward_pre_hook(lambda _, args, named: seen.append((*args, *named.values())[0]), with_kwargs=True)
    ids = torch.arange(5)[:, None] + 7
    if model.config.is_encoder_decoder:
        cache = cache_of(model(**read(model, ids), decoder_input_ids=ids, use_cache=True)).self_attention_cache
    else:
        cache = DynamicCache()
        model(ids, use_cache=True, **with_cache(model, cache))
    held = cache.layers[layer]
    return seen[0][:, 0], {"k": held.keys[:, :, 0].numpy(), "v": held.values[:, :, 0].numpy()}


@pytest.mark.parametrize(("model_type", "groups"), [*((name, 4) for name in SOURCES), ("falcon+multi_query", 1)])
def test_as_many_groups_as_heads_changes_no_byte(model_type: str, groups: int, save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny(model_type, dtype=torch.bfloat16)
    convert(str(source), tmp_path / "out", request(groups))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(source).config


@pytest.mark.parametrize(("model_type", "heads", "groups"), TARGETS)
@pytest.mark.parametrize(
    ("method", "seed"),
    [("mean", 0), pytest.param("first", 1, marks=pytest.mark.slow), pytest.param("mean", 2, marks=pytest.mark.slow)],
)
def test_converted_logits_equal_the_pooled_source(
    model_type: str, heads: int, groups: int, method: str, seed: int, save_tiny: Save, tmp_path: Path
) -> None:
    source = save_tiny(model_type, heads, seed=seed)
    convert(str(source), tmp_path / "out", request(groups, method))
    oracle = pool_model(load(source), groups, method)
    converted = load(tmp_path / "out")
    assert converted.config.model_type == result_attention(open_checkpoint(tmp_path / "out"), "out")[0].name
    with torch.no_grad():
        torch.testing.assert_close(logits(converted), logits(oracle), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "heads", "groups"), TARGETS)
def test_cached_generation_equals_uncached_and_keeps_only_its_heads(
    model_type: str, heads: int, groups: int, save_tiny: Save, tmp_path: Path
) -> None:
    convert(str(save_tiny(model_type, heads)), tmp_path / "out", request(groups))
    model = load(tmp_path / "out")
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    given = {**read(model, TOKENS), "attention_mask": torch.ones_like(TOKENS)}
    cached = model.generate(**given, **arguments)
    assert torch.equal(model.generate(**given, use_cache=False, **arguments), cached)

    if not model.config.is_encoder_decoder:
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), TOKENS], dim=1)
        mask = (torch.arange(padded.shape[1]) >= 4).long()[None]
        left = model.generate(padded, attention_mask=mask, **arguments)
        assert torch.equal(left[:, 4:], cached)

    layers = result_attention(open_checkpoint(tmp_path / "out"), "out")[1]
    context = 5  # below every sliding window, so that each token is still held
    held, source = cached_bytes(model, TOKENS[:, :context])
    layers = [replace(spec, num_key_value_heads=4) for spec in layers] if model_type == EXPANDED else layers
    cross = cross_bytes_per_token(layers, itemsize=4)
    assert held == context * (cache_bytes_per_token(layers, itemsize=4) - cross) + source * cross


@torch.no_grad()
def cached_bytes(model: PreTrainedModel, ids: torch.Tensor) -> tuple[int, int]:
    """Return the bytes of a model's cache after `ids`, and how many tokens an encoder has read, 0 without one."""
    if not model.config.is_encoder_decoder:
        caches, source = [DynamicCache(config=model.config)], 0
        model(ids, **with_cache(model, caches[0]))
    else:
        both = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        out = model(**read(model, ids), decoder_input_ids=ids, **with_cache(model, both))
        caches, source = [both.self_attention_cache, both.cross_attention_cache], out.encoder_last_hidden_state.shape[1]
    layers = [layer for cache in caches for layer in cache.layers if layer.is_initialized]
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values)), source


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_tied_and_untied_heads_both_carry_over(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    for tied in (True, False):
        source = save_tiny(model_type, name=f"src{tied}", tie_word_embeddings=tied)
        convert(str(source), tmp_path / f"out{tied}", request(2))
        oracle, converted = pool_model(load(source), 2), load(tmp_path / f"out{tied}")
        with torch.no_grad():
            torch.testing.assert_close(converted(TOKENS).logits, oracle(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_gpt2_without_prefix_and_with_old_buffers(tmp_path: Path, save_tiny: Save) -> None:
    """The Hub's own gpt2 has no `transformer.` prefix and carries mask buffers."""
    source = save_tiny("gpt2")
    state = load_file(source / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64)
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    from safetensors.torch import save_file

    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    for groups in (2, 1):
        convert(str(source), tmp_path / str(groups), request(groups))
        names = open_checkpoint(tmp_path / str(groups)).tensors
        assert not any("masked_bias" in name or name.endswith(".attn.bias") for name in names)
        oracle = pool_model(tiny_model(tiny_config("gpt2")), groups)
        with torch.no_grad():
            torch.testing.assert_close(
                load(tmp_path / str(groups))(TOKENS).logits, oracle(TOKENS).logits, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("model_type", UNGROUPED)
def test_a_family_of_one_head_or_all_refuses_groups(model_type: str, save_tiny: Save) -> None:
    with pytest.raises(UsageError, match="new_decoder_architecture"):
        plan_conversion(str(save_tiny(model_type)), request(2))


def test_a_class_that_copies_heads_into_its_cache_is_told_of(
    save_tiny: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, told in ((EXPANDED, True), ("falcon", False)):
        source = str(save_tiny(name, name=name))
        for arguments in (["convert", source, "out", "--to", "mqa", "--dry-run"], ["inspect", source]):
            assert run(arguments) == 0
            assert ("caches a copy per query head" in " ".join(capsys.readouterr().out.split())) == told


@pytest.mark.parametrize("model_type", ["olmo2", "cohere+use_qk_norm"])
def test_random_heads_of_families_that_norm_by_head_have_a_fresh_norm(
    model_type: str, save_tiny: Save, tmp_path: Path
) -> None:
    convert(str(save_tiny(model_type)), tmp_path / "out", request(2, "random"))
    norms = [value for name, value in load(tmp_path / "out").named_parameters() if name.endswith("k_norm.weight")]
    assert len(norms) == 2 and all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_a_model_that_reads_both_ways_has_no_cache_to_shrink(model_type: str, save_tiny: Save) -> None:
    source = str(save_tiny(f"{model_type}+use_bidirectional_attention"))
    with pytest.raises(UsageError, match="use_bidirectional_attention"):
        plan_conversion(source, request(2))


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_norms_pooled_with_their_heads_keep_the_checkpoint_s_dtype(
    method: str, save_tiny: Save, tmp_path: Path
) -> None:
    convert(str(save_tiny("olmo2", dtype=torch.bfloat16)), tmp_path / "out", request(2, method))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert stored["model.layers.0.self_attn.k_norm.weight"].shape == (24,)
