"""`--method svd`: exact where heads differ only by what attention can't see, and never further off than a mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.conftest import tiny_config, tiny_model
from tests.conversion.test_families import EXPANDED, SOURCES, TARGETS, TOKENS, UNGROUPED, family, load, request
from tests.gauge import interleave_heads, scatter_heads, scatter_values
from tests.oracle import pool_model
from uptrain.architectures.schema import KeyNorm
from uptrain.checkpoint.checksum import checksum_file
from uptrain.checkpoint.manifest import read_manifest
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.request import Request
from uptrain.errors import UsageError
from uptrain.evaluation import EvaluationSettings, evaluate

Save = Callable[..., Path]


def key_norm(name: str) -> KeyNorm | None:
    norm = family(name).key_norm
    return norm if norm and (not norm.flag or norm.flag in name.split("+")) else None


DECODERS = [name for name in SOURCES if not family(name).cross]
"""Those that read an encoder: tests/models/test_encoder_decoders.py."""
NORMED = {name: norm for name in DECODERS if (norm := key_norm(name))}
NORMED_BY_HEAD = [name for name, norm in NORMED.items() if norm.by_head]
FIXED = [*NORMED_BY_HEAD, "bloom", "mpt", "falcon+alibi", "laguna"]
UNCALIBRATED = [name for name in DECODERS if family(name).uncalibrated and name not in NORMED]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "groups"),
    [(name, groups) for name, heads, groups in TARGETS if heads == 4 and name in DECODERS and name not in NORMED],
)
def test_heads_that_are_one_head_in_disguise_are_shared_without_loss(
    model_type: str, groups: int, tmp_path: Path
) -> None:
    """Mean pooling destroys such a model; a factorisation must find the shared head and give the logits back."""
    source = scatter_heads(tiny_model(tiny_config(model_type), seed=groups), groups)
    source.save_pretrained(tmp_path / "src")
    convert(str(tmp_path / "src"), tmp_path / "svd", request(groups, "svd"))
    convert(str(tmp_path / "src"), tmp_path / "mean", request(groups, "mean"))
    wanted = logits(source)
    found, pooled = logits(load(tmp_path / "svd")), logits(load(tmp_path / "mean"))
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() < 1e-4 * scale
    assert (pooled - wanted).abs().max() > 1e-2 * scale


def test_the_target_stays_the_same_stock_class_and_shapes(save_tiny: Save) -> None:
    source = str(save_tiny("qwen2"))
    plans = [plan_conversion(source, request(2, method))[2] for method in ("mean", "svd")]
    shapes = [{each.output.name: each.output.shape for each in plan.operations} for plan in plans]
    assert shapes[0] == shapes[1] and plans[0].target.name == plans[1].target.name == "qwen2"


def test_the_same_command_twice_gives_the_same_bytes(save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama", dtype=torch.bfloat16)
    for name in ("one", "two"):
        convert(str(source), tmp_path / name, request(1, "svd"))
    one, two = (checksum_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "method"),
    [(name, "mean" if name in NORMED else "svd") for name in DECODERS if name not in (*FIXED, *UNGROUPED)]
    + [(name, "mean") for name in ("gpt2", "qwen2", EXPANDED)],
)
def test_similar_heads_are_found_wherever_they_stand(model_type: str, method: str, tmp_path: Path) -> None:
    """Heads 0 and 2, and 1 and 3, are alike; sharing by neighbours breaks the model, by likeness loses nothing."""
    model = tiny_model(tiny_config(model_type))
    alike = scatter_heads(model, 2) if method == "svd" else pool_model(model, 2)
    wanted = logits(alike)
    interleave_heads(alike)
    torch.testing.assert_close(logits(alike), wanted, atol=1e-4, rtol=1e-4)
    alike.save_pretrained(tmp_path / "src")
    scale = wanted.abs().max()
    for grouping in ("similar", "contiguous"):
        convert(str(tmp_path / "src"), tmp_path / grouping, Request("gqa", 2, method, grouping=grouping))
        error = (logits(load(tmp_path / grouping)) - wanted).abs().max() / scale
        assert (error < 1e-4) == (grouping == "similar")


def test_energy_is_told_per_layer_and_survives_a_resume(tmp_path: Path) -> None:
    done = convert("demo", tmp_path / "svd", request(1, "svd"))
    manifest = read_manifest(tmp_path / "svd")
    assert manifest is not None and list(done.energy) == [0, 1, 2, 3]
    assert manifest["stages"][-1]["energy_kept"] == {str(layer): kept for layer, kept in done.energy.items()}
    for kept in done.energy.values():
        for side in ("keys", "values"):
            assert 1 >= kept["svd"][side] >= max(kept["mean"][side], kept["first"][side])
    told = convert("demo", tmp_path / "mean", request(1)).energy[2]
    for method in ("mean", "svd"):
        assert told[method] == pytest.approx(done.energy[2][method], abs=2e-4)


def test_clipped_projections_are_refused_with_what_to_use_instead(save_tiny: Save) -> None:
    source = save_tiny("olmo")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "clip_qkv": 8.0}))
    with pytest.raises(UsageError, match=r"clip_qkv\b.*8\.0") as caught:
        plan_conversion(str(source), request(2, "svd"))
    assert "--method mean" in caught.value.hint
    plan_conversion(str(source), request(2, "mean"))


@pytest.mark.parametrize("model_type", NORMED)
def test_keys_that_are_normed_after_projection_are_not_calibrated(model_type: str, save_tiny: Save) -> None:
    with pytest.raises(UsageError, match=r"keys are normed after projection|experts in other tensors"):
        plan_conversion(str(save_tiny(model_type)), request(2, "calibrated"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "groups"), [(name, groups) for name, heads, groups in TARGETS if heads == 4 and name in NORMED]
)
def test_under_normed_keys_values_that_are_one_head_in_disguise_are_shared_without_loss(
    model_type: str, groups: int, tmp_path: Path
) -> None:
    """The heads of a group have one key and values in gauges of their own, so that only averaging values loses."""
    source = scatter_values(pool_model(tiny_model(tiny_config(model_type), seed=groups), groups), groups)
    source.save_pretrained(tmp_path / "src")
    wanted, error = logits(source), {}
    for method in ("mean", "svd"):
        convert(str(tmp_path / "src"), tmp_path / method, request(groups, method))
        error[method] = (logits(load(tmp_path / method)) - wanted).abs().max() / wanted.abs().max()
    assert error["svd"] < 1e-4 and error["mean"] > 1e-3


def test_a_plan_says_that_normed_keys_are_averaged(save_tiny: Save) -> None:
    source = str(save_tiny("qwen3"))
    assert "normed" in plan_conversion(source, request(2, "svd"))[2].notes[0]
    assert not plan_conversion(source, request(2, "mean"))[2].notes


@pytest.mark.parametrize(("model_type", "key", "value"), [("olmoe", "clip_qkv", 8.0), ("laguna", "gating", "per-dim")])
def test_what_stands_between_values_and_output_leaves_pooling_alone(
    model_type: str, key: str, value: object, tmp_path: Path
) -> None:
    config = tiny_config(model_type)
    setattr(config, key, value)
    tiny_model(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=key):
        plan_conversion(str(tmp_path), request(2, "svd"))
    plan_conversion(str(tmp_path), request(2, "mean"))


@pytest.mark.parametrize("model_type", UNCALIBRATED)
def test_experts_that_no_layer_can_be_run_with_are_not_calibrated(model_type: str, save_tiny: Save) -> None:
    source = str(save_tiny(model_type))
    with pytest.raises(UsageError, match="experts in other tensors") as caught:
        plan_conversion(source, request(2, "calibrated"))
    assert "--method svd" in caught.value.hint
    plan_conversion(source, request(2, "svd"))


@pytest.mark.parametrize("model_type", FIXED)
def test_heads_with_a_norm_a_slope_or_a_gate_of_their_own_are_not_moved(model_type: str, save_tiny: Save) -> None:
    with pytest.raises(UsageError, match=r"--grouping similar .*(weights|slope|gate)"):
        plan_conversion(str(save_tiny(model_type)), Request("gqa", 2, grouping="similar"))


@pytest.mark.slow
@pytest.mark.parametrize("groups", [4, 1])
def test_on_the_demo_it_stays_closer_than_mean_before_any_training(groups: int, tmp_path: Path) -> None:
    divergence, settings = {}, EvaluationSettings(tokens=4096, repeats=0)
    for method in ("mean", "svd"):
        convert("demo", tmp_path / method, request(groups, method))
        divergence[method] = evaluate(str(tmp_path / method), settings, baseline="demo").kl
    assert divergence["svd"] < divergence["mean"]
