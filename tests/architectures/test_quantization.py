"""Quantized checkpoints: what isn't read is named, what is only passed on stays as it was, and codes are no weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import tiny_config, tiny_model
from tests.conversion.test_families import load, logits
from tests.corpus import corpus
from tests.oracle import pool_and_repeat, pool_model
from tests.quantized import PLAIN, SCHEMES, THROUGHOUT, fp8, save_plain, save_quantized
from uptrain.architectures.quantization import check_read, quantization_of
from uptrain.checkpoint.reader import open_checkpoint, read_config
from uptrain.checkpoint.source import resolve
from uptrain.cli.app import run
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.inspection import inspect
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError, UptrainError, UsageError
from uptrain.models import loading
from uptrain.models.loading import load as load_for_generating
from uptrain.models.opened import open_model
from uptrain.models.precision import place_model
from uptrain.publishing.hub.card import build_card
from uptrain.publishing.hub.licence import Licence
from uptrain.publishing.hub.subject import CardSubject
from uptrain.publishing.page.head_maps import plot_heads
from uptrain.training import train
from uptrain.training.recipes import parse_recipe

Save = Callable[..., Path]
GQA = Request("gqa", 2)
MLA = Request("mla", rope="longrope", dtype=None)
REQUESTS = [GQA, Request("mqa", method="svd"), MLA, Request("gqa", 4)]


@pytest.mark.parametrize("declare", [True, False], ids=["declared", "undeclared"])
@pytest.mark.parametrize("scheme", THROUGHOUT)
def test_a_source_that_is_quantized_throughout_is_named(scheme: str, declare: bool, tmp_path: Path) -> None:
    source = save_quantized(tmp_path / "src", scheme, attention=True, declare=declare)
    called = SCHEMES[scheme].called if declare else "quantized with "
    for request in REQUESTS:
        with pytest.raises(CheckpointError, match=called) as caught:
            convert(str(source), tmp_path / "out", request)
        assert "full-precision" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tensors_alone_tell_the_scheme(scheme: str, tmp_path: Path) -> None:
    source = save_quantized(tmp_path / "src", scheme, SCHEMES[scheme].attention, declare=False)
    found = inspect(str(source)).quantised
    if scheme != "int8":  # weights and scales, which several tools write
        assert found.partition(",")[0] == SCHEMES[scheme].called.partition(",")[0]
    assert found


@pytest.mark.parametrize(
    ("scheme", "attention"), [*((name, False) for name in SCHEMES), *((name, True) for name in THROUGHOUT)]
)
def test_inspect_shows_parameters_and_cache_as_before_quantization(
    scheme: str, attention: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_quantized(tmp_path / "src", scheme, attention)
    found, plain = inspect(str(source)), inspect(str(save_plain(tmp_path / "plain")))
    assert found.quantised == SCHEMES[scheme].called
    assert found.parameters == plain.parameters
    assert (found.cache_bytes_per_token, found.cache_bytes) == (plain.cache_bytes_per_token, plain.cache_bytes)
    assert [option.target for option in found.options] == ([] if attention else ["gqa", "mqa"])
    assert run(["inspect", str(source)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert SCHEMES[scheme].called in shown
    assert ("full-precision original" in shown) == attention


@pytest.mark.parametrize(("key", "said", "itemsize"), [("dtype", "float32", 4), ("torch_dtype", "torch.float16", 2)])
def test_the_cache_is_priced_by_what_the_config_says_the_model_computes_in(
    key: str, said: str, itemsize: int, tmp_path: Path
) -> None:
    says: dict[str, Any] = {"torch_dtype": None, key: said}
    source = save_quantized(tmp_path / "src", "bnb8", attention=True, **says)
    assert inspect(str(source)).cache_bytes_per_token == 2 * 2 * 64 * itemsize


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_parts_pass_through_bit_by_bit_where_attention_floats(scheme: str, tmp_path: Path) -> None:
    source = save_quantized(tmp_path / "src", scheme, attention=False)
    convert(str(source), tmp_path / "out", GQA)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in after.items():
        wanted = before[name]
        if "k_proj" in name or "v_proj" in name:
            wanted = pool_and_repeat(wanted.unflatten(0, (4, 16)), 2, "mean")[::2].flatten(0, 1)
        assert value.dtype == wanted.dtype
        assert value.reshape(-1).view(torch.uint8).tolist() == wanted.reshape(-1).view(torch.uint8).tolist(), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")]
    key = SCHEMES[scheme].key
    assert configs[1][key] == configs[0][key]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "lost", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_what_is_missing_beside_codes_is_named(scheme: str, lost: str, tmp_path: Path) -> None:
    source = save_quantized(tmp_path / "src", scheme, attention=False)
    found = load_file(source / "model.safetensors")
    del found[lost]
    save_file(found, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks|is missing"):
        convert(str(source), tmp_path / "out", GQA)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_that_is_not_quantized_like_the_others_lacks_nothing(scheme: str, tmp_path: Path) -> None:
    source, plain = save_quantized(tmp_path / "src", scheme, attention=False), save_plain(tmp_path / "plain")
    found, floats = (load_file(folder / "model.safetensors") for folder in (source, plain))
    kept = {name: value for name, value in found.items() if not name.startswith("model.layers.0.mlp.")}
    kept |= {name: value for name, value in floats.items() if name.startswith("model.layers.0.mlp.")}
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    assert convert(str(source), tmp_path / "out", GQA).out.is_dir()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "request_",
    [
        MLA,
        Request("mla", rope="re-rotate"),
        Request("gqa", 2, dtype="float32"),
        Request("gqa", 2, "calibrated"),
    ],
    ids=["deepseek_v3", "uptrain_llama_mla", "dtype", "calibrated"],
)
def test_what_would_not_leave_codes_as_they_are_is_refused(scheme: str, request_: Request, tmp_path: Path) -> None:
    source = save_quantized(tmp_path / "src", scheme, attention=False)
    with pytest.raises(UsageError, match=r"parts (of which|that) are quantized with"):
        convert(str(source), tmp_path / "out", request_)
    assert not (tmp_path / "out").exists()


def quantize_mlp(folder: Path, part: str) -> None:
    """Store the linears whose names have `part` as fp8 with block scales, as transformers reads it."""
    found = load_file(folder / "model.safetensors")
    for name in [name for name in found if part in name and name.endswith(".weight")]:
        found.update(fp8(name.removesuffix(".weight"), found.pop(name)))
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    skipped = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "query_key_value", "dense", "lm_head", "embed_out"]
    config["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": skipped,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "part"), [("llama", ".mlp."), ("qwen2", ".mlp."), ("opt", ".fc")])
@pytest.mark.parametrize("method", ["mean", "first"])
def test_the_result_is_what_transformers_makes_of_the_pooled_source(
    model_type: str, part: str, method: str, tmp_path: Path
) -> None:
    """OPT's result is a class of ours, whose modules have the same names."""
    source = tmp_path / "src"
    tiny_model(tiny_config(model_type)).save_pretrained(source)
    whole = logits(load(source))
    quantize_mlp(source, part)
    oracle = pool_model(load(source), 2, method)
    assert (logits(load(source)) - whole).abs().max() > 1e-4 * whole.abs().max()  # it does read the codes
    convert(str(source), tmp_path / "out", Request("gqa", 2, method))
    with torch.no_grad():
        torch.testing.assert_close(logits(load(tmp_path / "out")), logits(oracle), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "request_"),
    [("gpt_neox", GQA), ("gptj", GQA), ("gpt_neox", Request("mqa")), ("gpt2", Request("mqa")), ("gpt2", MLA)],
)
def test_classes_with_other_names_or_weights_do_not_take_codes(
    model_type: str, request_: Request, tmp_path: Path
) -> None:
    source = tmp_path / "src"
    tiny_model(tiny_config(model_type)).save_pretrained(source)
    if model_type == "gpt2" and request_.target == "mla":
        request_ = Request("mla")
    plan_conversion(str(source), request_)
    quantize_mlp(source, ".mlp.")
    with pytest.raises(UsageError, match=r"quantized with fp8 .* other names or weights"):
        plan_conversion(str(source), request_)


def test_a_config_that_quantizes_floats_while_loading_is_not_dropped(tmp_path: Path) -> None:
    """Such a source is quantized by its loader, and so is its result; a latent's config would lose that."""
    says = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}
    source = save_plain(tmp_path / "src", quantization_config=says)
    convert(str(source), tmp_path / "out", Request("gqa", 2, dtype="float32"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == says
    with pytest.raises(UsageError, match="bitsandbytes, 8 bits, and as a deepseek_v3") as caught:
        plan_conversion(str(source), MLA)
    assert "remove quantization_config" in caught.value.hint


@pytest.mark.parametrize("where", ["config", "tensors"])
def test_a_quantized_cache_fits_the_heads_it_was_measured_on(where: str, tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float"} if where == "config" else None
    says = {**SCHEMES["packed"].says, "kv_cache_scheme": scheme}
    source = save_quantized(tmp_path / "src", "packed", attention=False, quantization_config=says)
    if where == "tensors":
        plan_conversion(str(source), GQA)
        found = load_file(source / "model.safetensors")
        scales = {f"model.layers.0.self_attn.{part}_scale": torch.tensor([1.0]) for part in "kv"}
        save_file({**found, **scales}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="quantized key/value cache"):
        plan_conversion(str(source), GQA)


def test_a_module_without_a_weight_is_not_called_a_broken_download(tmp_path: Path) -> None:
    """A scheme that uptrain has never seen stores nothing under names that it knows."""
    source = save_plain(tmp_path / "src", quantization_config={"quant_method": "brand-new"})
    found = {name.replace("k_proj.weight", "k_proj.residue"): value for name, value in PLAIN.items()}
    save_file(found, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="brand-new"):
        plan_conversion(str(source), GQA)
    assert inspect(str(source)).quantised == "brand-new"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_floats_of_8_bits_without_scales_are_values_but_no_other_dtype_s(name: str, tmp_path: Path) -> None:
    source = save_plain(tmp_path / "src")
    save_file({**PLAIN, name: PLAIN[name].to(torch.float8_e4m3fn)}, source / "model.safetensors", {"format": "pt"})
    convert(str(source), tmp_path / "out", GQA)
    assert load_file(tmp_path / "out" / "model.safetensors")[name].dtype is torch.float8_e4m3fn
    with pytest.raises(UsageError, match="--dtype"):
        plan_conversion(str(source), Request("gqa", 2, dtype="float32"))


def test_plain_checkpoints_are_not_taken_for_quantized(tmp_path: Path) -> None:
    source = save_plain(tmp_path / "src", quantization_config=None)
    masks = {"model.layers.0.self_attn.mask": torch.ones(4, 4, dtype=torch.uint8), "ids": torch.arange(3)}
    save_file({**PLAIN, **masks}, source / "model.safetensors", {"format": "pt"})
    found = inspect(str(source))
    assert not found.quantised and not found.unreadable
    assert {option.target for option in found.options} == {"gqa", "mqa", "mla"}


def test_a_quantization_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    source = save_plain(tmp_path / "src", quantization_config="4bit")
    with pytest.raises(CheckpointError, match="quantization_config"):
        plan_conversion(str(source), GQA)


def test_files_of_older_tools_tell_the_width(tmp_path: Path) -> None:
    source = save_quantized(tmp_path / "src", "gptq", attention=True, declare=False)
    (source / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    found = inspect(str(source))
    assert found.quantised == "GPTQ, 4 bits" and found.parameters == inspect(str(save_plain(tmp_path / "p"))).parameters


@pytest.mark.parametrize("scheme", ["gptq", "bnb4", "int8", "mlx"])
def test_codes_are_never_loaded_as_weights(scheme: str, tmp_path: Path) -> None:
    """Eval and train load through transformers, which skips what it doesn't know or isn't told of."""
    undeclared = save_quantized(tmp_path / "undeclared", scheme, attention=False, declare=False)
    for read in (lambda folder: loading.load_model(open_model(resolve(str(folder)))), load_for_generating):
        with pytest.raises(CheckpointError, match="codes for weights"):
            read(undeclared)
    says = {"quant_method": "brand-new", "bits": 4}
    unknown = save_quantized(tmp_path / "unknown", scheme, attention=False, quantization_config=says)
    for read in (lambda folder: loading.load_model(open_model(resolve(str(folder)))), load_for_generating):
        with pytest.raises(CheckpointError, match="brand-new"):
            read(unknown)


def test_scales_that_a_class_has_no_place_for_are_not_lost(tmp_path: Path) -> None:
    """As of linears that are none of torch's, which transformers' quantizer leaves alone, codes and all."""
    found = quantization_of(open_checkpoint(save_quantized(tmp_path / "src", "fp8", attention=False)))
    check_read(found, ["model.layers.0.self_attn.rotary_emb.inv_freq"], "src")
    check_read(None, ["model.layers.0.mlp.up_proj.weight_scale_inv"], "src")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale_inv"):
        check_read(found, ["model.layers.0.mlp.up_proj.weight_scale_inv", "other"], "src")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_of_which_the_config_is_silent_are_not_passed_on(scheme: str, tmp_path: Path) -> None:
    source = save_quantized(tmp_path / "src", scheme, attention=False, declare=False)
    with pytest.raises(CheckpointError, match="codes for weights"):
        plan_conversion(str(source), GQA)


@pytest.mark.parametrize("scheme", ["gptq", "bnb4", "packed"])
def test_a_library_that_is_not_there_is_a_sentence_that_names_the_scheme(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_quantized(tmp_path / "src", scheme, attention=False)

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("it needs a library")

    monkeypatch.setattr(loading.transformers.LlamaForCausalLM, "from_pretrained", absent)
    with pytest.raises(CheckpointError, match=SCHEMES[scheme].called):
        loading.load_model(open_model(resolve(str(source))))


@pytest.mark.parametrize("scheme", ["fp8", "bnb8", "gptq"])
def test_codes_are_not_trained(scheme: str, tmp_path: Path) -> None:
    source = save_quantized(tmp_path / "src", scheme, attention=False)
    text = corpus(tmp_path / "text.txt")
    recipe = parse_recipe({"model": str(source), "output": str(tmp_path / "out"), "data": [str(text)], "steps": 1})
    with pytest.raises(UsageError, match=SCHEMES[scheme].called):
        train(recipe)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_a_model_that_computes_with_codes_keeps_them(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert place_model(model, None, torch.float64)[0].weight.dtype is torch.float64
    model[1].weight = torch.nn.Parameter(torch.ones(2, 2).to(dtype), requires_grad=False)
    found = place_model(model, torch.device("cpu"), torch.float32)
    assert [layer.weight.dtype for layer in found] == [torch.float64, dtype]


def test_pictures_of_codes_are_not_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = save_quantized(tmp_path / "src", "int8", attention=True)
    with pytest.raises(CheckpointError, match="compressed-tensors"):
        plot_heads(str(source), tmp_path / "heads.png")
    assert not (tmp_path / "heads.png").exists()


@pytest.mark.parametrize("scheme", ["fp8", "packed"])
def test_a_card_says_what_is_quantized(scheme: str, tmp_path: Path) -> None:
    source = save_quantized(tmp_path / "src", scheme, attention=False)
    out = convert(str(source), tmp_path / "out", GQA).out
    stages = json.loads((out / "uptrain.json").read_text())["stages"]
    card = build_card(CardSubject("me/small", stages, read_config(out), None), Licence("mit", "a test"), None, ({}, ""))
    assert f"outside attention are quantized ({SCHEMES[scheme].called})" in str(card)
    assert f"{2 * 2 * 32 * 2:,} bytes per token" in str(card)  # bfloat16, as the model computes


@pytest.mark.parametrize("config", [True, False], ids=["config", "alone"])
def test_gguf_files_are_named(config: bool, tmp_path: Path) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    if config:
        (folder / "config.json").write_text('{"model_type": "llama"}')
    for model in (folder, folder / "model.Q4_K_M.gguf"):
        for ask in (lambda name: convert(name, tmp_path / "out", GQA), inspect):
            with pytest.raises(UptrainError, match=r"model\.Q4_K_M\.gguf"):
                ask(str(model))


def test_inspecting_codes_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    source = save_quantized(tmp_path / "src", "mxfp4", attention=False)
    code = (
        "import sys; from uptrain.cli.app import run; "
        f"assert run(['inspect', {str(source)!r}]) == 0; assert run(['convert', {str(source)!r}, '--dry-run']) == 0; "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
