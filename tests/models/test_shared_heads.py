"""Our own classes of families that count no key/value heads, against transformers' class with pooled heads repeated."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.conversion.test_families import TOKENS, load, request
from tests.models.test_gpt2_checkpoint import run_python
from tests.oracle import pool_model
from uptrain.architectures.decoders import FAMILIES
from uptrain.conversion import convert, plan_conversion
from uptrain.errors import UsageError

Save = Callable[..., Path]
OWN = ["opt", "bloom", "mpt", "gpt_neo", "persimmon+qk_layernorm"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("opt", {"enable_bias": False, "activation_function": "gelu", "layer_norm_elementwise_affine": False}),
    ("opt", {"_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    ("bloom", {"apply_residual_connection_post_layernorm": True, "n_head": 6}),
    ("gpt_neo", {"attention_types": [[["local"], 2]], "window_size": 3, "intermediate_size": 40}),
    ("persimmon", {"hidden_act": "gelu", "tie_word_embeddings": True}),
    ("mpt", {"n_heads": 6, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2, "alibi_bias_max": 4}}),
]
PAIRS = torch.tensor([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 32]])


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=lambda value: next(iter(value), "")[:20])
def test_a_family_s_options_keep_their_meaning(
    model_type: str, changes: dict[str, Any], pair: Callable[..., tuple[PreTrainedModel, PreTrainedModel]]
) -> None:
    model, oracle = pair(model_type, **changes)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, oracle(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", OWN)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batches_and_both_kernels_agree_with_the_oracle(
    model_type: str, attention: str, pair: Callable[..., tuple[PreTrainedModel, PreTrainedModel]]
) -> None:
    model, oracle = pair(model_type)
    if attention == "sdpa" and not model._supports_sdpa:
        attention = "eager"
    for each in (model, oracle):
        each.set_attn_implementation(attention)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        found, wanted = (each(PAIRS, attention_mask=mask).logits[mask.bool()] for each in (model, oracle))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", OWN)
@pytest.mark.parametrize("groups", [1, 2])
def test_beam_search_and_a_static_cache_find_what_the_oracle_finds(
    model_type: str, groups: int, pair: Callable[..., tuple[PreTrainedModel, PreTrainedModel]]
) -> None:
    model, oracle = pair(model_type, groups)
    arguments: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(PAIRS)}
    wanted = oracle.generate(PAIRS, num_beams=3, **arguments)
    assert torch.equal(model.generate(PAIRS, num_beams=3, **arguments), wanted)
    greedy = oracle.generate(PAIRS, **arguments)
    assert torch.equal(model.generate(PAIRS, **arguments), greedy)
    if model._can_compile_fullgraph:
        assert torch.equal(model.generate(PAIRS, cache_implementation="static", **arguments), greedy)


@pytest.mark.parametrize("model_type", OWN)
def test_gradients_are_the_oracle_s_summed_over_the_heads_that_share(
    model_type: str, pair: Callable[..., tuple[PreTrainedModel, PreTrainedModel]]
) -> None:
    model, oracle = pair(model_type)
    checkpointed = copy.deepcopy(model).train()
    getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)()
    for each in (model.train(), oracle.train(), checkpointed):
        each.config.dropout = 0.0
        for module in each.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        each(PAIRS, labels=PAIRS, use_cache=False).loss.backward()
    wanted, again = dict(oracle.named_parameters()), dict(checkpointed.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again[name].grad, parameter.grad, rtol=0, atol=0, msg=name)
        if parameter.shape == wanted[name].shape:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-5, msg=name)


REMOTE = """
import sys
sys.modules["uptrain"] = None  # any import of it now fails, installed or not
import torch
from transformers import AutoModel, AutoModelForCausalLM
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor([[5, 7, 11, 2]])
assert torch.equal(body(ids).last_hidden_state, model.base_model(ids).last_hidden_state)
print(model(ids).logits.double().sum().item())
model.save_pretrained(again)
assert AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)(ids).logits.isfinite().all()
"""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OWN)
def test_a_converted_folder_loads_without_uptrain(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    convert(str(save_tiny(model_type)), tmp_path / "out", request(2))
    total = run_python(REMOTE, tmp_path / "out", tmp_path / "again", home=tmp_path)
    assert float(total) == pytest.approx(
        load(tmp_path / "out")(torch.tensor([[5, 7, 11, 2]])).logits.sum().item(), abs=1e-2
    )
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]


@pytest.mark.parametrize("model_type", OWN)
def test_a_result_can_be_converted_again(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    convert(str(save_tiny(model_type)), tmp_path / "two", request(2))
    convert(str(tmp_path / "two"), tmp_path / "one", request(1))
    convert(str(tmp_path / "src"), tmp_path / "direct", request(1))
    with torch.no_grad():
        found, wanted = (load(tmp_path / name)(TOKENS).logits for name in ("one", "direct"))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", OWN)
def test_a_checkpoint_of_the_body_alone_converts(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    """As older checkpoints on the Hub are: no prefix before the body's names, and the head tied to the embedding."""
    source = save_tiny(model_type)
    prefix = f"{load(source).base_model_prefix}."
    state = load_file(source / "model.safetensors")
    save_file({name.removeprefix(prefix): value for name, value in state.items()}, source / "model.safetensors")
    convert(str(source), tmp_path / "out", request(2))
    with torch.no_grad():
        found, wanted = load(tmp_path / "out")(TOKENS).logits, pool_model(load(source), 2)(TOKENS).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", OWN)
def test_numbers_of_heads_that_do_not_divide_are_refused(model_type: str, save_tiny: Save, tmp_path: Path) -> None:
    convert(str(save_tiny(model_type)), tmp_path / "out", request(2))
    config = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"num_key_value_heads.*{wrong}"):
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "num_key_value_heads": wrong}))


def test_a_bloom_config_with_its_older_words_is_read(save_tiny: Save, tmp_path: Path) -> None:
    """As bigscience's own files have it."""
    source = save_tiny("bloom")
    config = json.loads((source / "config.json").read_text())
    for key, older in FAMILIES["bloom"].older.items():
        config[older] = config.pop(key)
    (source / "config.json").write_text(json.dumps({**config, "seq_length": 2048}))
    convert(str(source), tmp_path / "out", request(2))
    with torch.no_grad():
        found, wanted = load(tmp_path / "out")(TOKENS).logits, pool_model(load(source), 2)(TOKENS).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("key", "value"), [("qk_ln", True), ("alibi", False), ("prefix_lm", True)])
def test_what_transformers_leaves_out_of_mpt_is_refused(key: str, value: bool, save_tiny: Save) -> None:
    source = str(save_tiny("mpt", attn_config={key: value}))
    with pytest.raises(UsageError, match=rf"attn_config\.{key}\b"):
        plan_conversion(source, request(2))


def test_a_clipped_mpt_is_pooled_only(save_tiny: Save) -> None:
    source = str(save_tiny("mpt", attn_config={"clip_qkv": 6.0}))
    with pytest.raises(UsageError, match=r"attn_config\.clip_qkv\b.*6\.0") as caught:
        plan_conversion(source, request(2, "svd"))
    assert "--method mean" in caught.value.hint
    plan_conversion(source, request(2))


def test_an_mpt_says_how_far_its_positions_reach(save_tiny: Save, tmp_path: Path) -> None:
    convert(str(save_tiny("mpt")), tmp_path / "out", request(2))
    assert AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 64
