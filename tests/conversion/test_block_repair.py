"""Block repair on tiny models of every layout: what it changes is written, what it does not keeps its bytes."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conversion.test_calibrate import LAYOUTS, QUICK, logits, opened, save, tokens
from tests.conversion.test_families import load
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.manifest import read_manifest
from uptrain.cli.app import run as run_cli
from uptrain.conversion import request as requests
from uptrain.conversion.calibration import run
from uptrain.conversion.calibration.engine import calibrate
from uptrain.conversion.calibration.layer_search import LayerSearch
from uptrain.conversion.calibration.store import CalibratedLayers
from uptrain.conversion.plan.repairs import repairable
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import UsageError
from uptrain.methods.head_conversion import maps_of

STEPS = 6
BLOCKS = replace(QUICK, repair_steps=2, block_steps=STEPS)
LATENTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"kv_lora_rank": 12}),
    ("llama", {"kv_lora_rank": 12, "qk_rope_head_dim": 4}),
    ("llama", {"kv_lora_rank": 12, "rope": "pre-rope"}),
]


@pytest.fixture(autouse=True)
def _text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrate on tokens that a tiny model without a tokenizer knows."""
    ids = tokens().numpy()
    text = SimpleNamespace(ids=ids, text_of=(0,) * len(ids), texts=(), short=(), boundary=None)
    monkeypatch.setattr(run, "calibration_text", lambda plan: text)
    monkeypatch.setattr(run, "boundary_in", lambda *_: None)
    monkeypatch.setattr(requests, "BLOCK_STEPS", STEPS)


@pytest.fixture
def _accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept every step: what tiny random models learn of random tokens seldom holds for other tokens."""
    errors = count(0, -1)
    monkeypatch.setattr(LayerSearch, "_error", lambda search, maps: float(next(errors)))


def converted(source: Path, out: Path, **changes: Any) -> Path:
    request = Request(**{"target": "mqa", "method": "calibrated", "repair": "blocks", "repair_steps": 2, **changes})
    convert(str(source), out, request)
    return out


def changed(folder: Path) -> set[str]:
    """Return what uptrain.json says was changed outside attention."""
    manifest = read_manifest(folder)
    assert manifest is not None
    return {name for layer in manifest["stages"][-1]["calibration"]["layers"] for name in layer.get("changed", ())}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[CalibratedLayers]:
    """Collect what calibrations made, which a finished conversion removes."""
    found: list[CalibratedLayers] = []
    build = import_module("uptrain.conversion.run.build")
    with_pairs = build.with_rotary_pairs

    def keep(checkpoint: Any, plan: Any, calibrated: CalibratedLayers) -> Any:
        found.append(CalibratedLayers.left(calibrated.folder, calibrated.plan) or calibrated)
        found[-1].layers = [found[-1].made(layer) for layer in range(len(found[-1]))]  # type: ignore[attr-defined]
        return with_pairs(checkpoint, plan, calibrated)

    monkeypatch.setattr(build, "with_rotary_pairs", keep)
    return found


@pytest.mark.usefixtures("_accepted")
@pytest.mark.slow
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_the_result_computes_what_was_calibrated(tmp_path, model_type, kept):
    source = save(tmp_path / "source", model_type)
    out = converted(source, tmp_path / "out")
    assert changed(out)
    made = [layer for stored in kept for layer in stored.layers]
    # The oracle is the source's own class, with the repaired tensors under their own names, and its heads repeated.
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = model.state_dict()
    for layer in made:
        for name, value in layer.others.items():
            assert not torch.equal(state[name], torch.from_numpy(value))
            state[name] = torch.from_numpy(value)
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "repaired")
    expected = logits(tmp_path / "repaired", [layer.attention for layer in made], tokens(2))
    with torch.no_grad():
        torch.testing.assert_close(load(out)(tokens(2)).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_no_layers_error_rises_and_what_is_left_alone_keeps_its_bytes(tmp_path, model_type):
    target = opened(save(tmp_path, model_type), 1)
    allowed = {name for layer in range(len(target.before)) for name in repairable(target.source, layer).values()}
    inside = tuple(target.source.attention_name(layer) for layer in range(len(target.before)))
    for _, _, report in calibrate(target, tokens(), BLOCKS):
        choice = report.choice
        assert choice.error <= choice.error_attention <= choice.error_refit
        assert bool(report.others) == bool(choice.block_steps)
        assert report.others.keys() <= allowed
        assert not any(name.startswith(inside) for name in report.others)
        for name, value in report.others.items():
            assert value.shape == target.source.tensors[name].shape


@pytest.mark.usefixtures("_accepted")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tensor_that_was_not_changed_has_the_sources_bytes(tmp_path, dtype):
    source = save(tmp_path / "source", "llama", torch_dtype=dtype)
    out = converted(source, tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    found = {name for name in before if before[name].shape == after[name].shape and name not in changed(out)}
    left = {name for name in found if "self_attn" not in name}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= left
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in left)
    moved = {name for name in changed(out) if not torch.equal(before[name], after[name])}
    assert any("mlp" in name for name in moved) and any("norm" in name for name in moved)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_zero_steps_change_no_byte(tmp_path, model_type, monkeypatch):
    source = save(tmp_path / "source", model_type)
    monkeypatch.setattr(requests, "BLOCK_STEPS", 0)
    out, plain = converted(source, tmp_path / "out"), converted(source, tmp_path / "plain", repair="attention")
    one, two = load_file(out / "model.safetensors"), load_file(plain / "model.safetensors")
    assert one.keys() == two.keys() and not changed(out)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("_accepted")
@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "latent"), LATENTS)
def test_a_latent_is_repaired_with_its_norms_and_mlp(tmp_path, model_type, latent, kept):
    source = save(tmp_path / "source", model_type)
    out = converted(source, tmp_path / "out", target="mla", **latent)
    assert changed(out)
    with torch.no_grad():
        repaired = load(out)(tokens(2)).logits
        plain = load(converted(source, tmp_path / "plain", target="mla", repair="attention", **latent))
        assert not torch.equal(plain(tokens(2)).logits, repaired)


@pytest.mark.usefixtures("_accepted")
@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "changes"), [("gpt2", {}), ("llama", {}), ("llama", {"target": "mla"})])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path, model_type, changes, monkeypatch):
    source = save(tmp_path / "source", model_type)
    whole = converted(source, tmp_path / "whole", **changes)

    class Cut(Exception):
        pass

    add = CalibratedLayers.add

    def once(self: CalibratedLayers, *arguments: Any) -> None:
        add(self, *arguments)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedLayers, "add", once)
        with pytest.raises(Cut):
            converted(source, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
    out = converted(source, tmp_path / "out", **changes)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert changed(out) == changed(whole)


def test_steps_that_err_more_on_held_out_text_are_undone(tmp_path):
    target = opened(save(tmp_path, "llama"), 1)
    wild = replace(BLOCKS, block_rate=1e3)
    plain = list(calibrate(target, tokens(), replace(BLOCKS, block_steps=0)))
    for (_, heads, report), (_, expected, _) in zip(calibrate(target, tokens(), wild), plain, strict=True):
        assert report.choice.block_steps == 0 and not report.others
        assert all(torch.equal(one, two) for one, two in zip(_tensors(heads), _tensors(expected), strict=True))


def test_experts_and_buffers_stay(tmp_path):
    source = opened(save(tmp_path, "llama"), 1).source
    extra = TensorInfo("model.layers.0.mlp.experts.gate_up_proj", "F32", (4, 8, 8), "", -1, -1)
    codes = TensorInfo("model.layers.0.mlp.codes", "U8", (8, 8), "", -1, -1)
    tensors = {**source.tensors, extra.name: extra, codes.name: codes}
    fake: Any = SimpleNamespace(
        tensors=tensors, prefix=source.prefix, attention_name=source.attention_name, family=source.family
    )
    assert set(repairable(fake, 0)) == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }  # fmt: skip


def test_an_unknown_repair_and_one_without_text_are_refused(capsys):
    with pytest.raises(UsageError, match="repair"):
        Request("mqa", method="calibrated", repair="block")
    with pytest.raises(UsageError, match="repair"):
        Request("mqa", method="svd", repair="blocks")
    assert run_cli(["convert", "demo", "--to", "mqa", "--repair", "blocks"]) == 2
    assert "--repair" in capsys.readouterr().err


def _tensors(heads: Any) -> list[torch.Tensor]:
    return [value for value in vars(maps_of(heads)).values() if value is not None]
