"""Heads that move take all along that counts them, or stay: transformers' class with the source's weights says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.conversion.test_families import TOKENS, load, logits, read
from tests.oracle import head_views, linears_of
from tests.small import save_small, small_tensors
from uptrain.checkpoint.manifest import read_manifest
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.request import Request
from uptrain.conversion.run import pipeline
from uptrain.errors import CheckpointError, UptrainError, UsageError

Save = Callable[..., Path]
SIMILAR = Request("gqa", 2, grouping="similar")


@torch.no_grad()
def twin_heads(folder: Path) -> PreTrainedModel:
    """Make the second half of a saved decoder's key/value heads the twins of the first; return the model."""
    model = load(folder)
    for name, module in model.named_modules():
        if linears_of(module) and "encoder" not in name.split("."):
            views = head_views(module)
            for view in (*views["k"], *views["v"]):
                view[len(view) // 2 :] = view[: len(view) // 2].clone()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", ["bart", "whisper"])
def test_twins_of_a_decoder_that_reads_an_encoder_share_without_loss(
    model_type: str, save_tiny: Save, tmp_path: Path
) -> None:
    source = save_tiny(model_type)
    model = twin_heads(source)
    convert(str(source), tmp_path / "out", SIMILAR)
    with torch.no_grad():
        torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_heads_with_a_relative_bias_of_their_own_do_not_move(model_type: str, save_tiny: Save) -> None:
    with pytest.raises(UsageError, match="relative_attention_bias"):
        plan_conversion(str(save_tiny(model_type)), SIMILAR)


def with_alignment(folder: Path, pairs: Any) -> Path:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alignment_heads": pairs}))
    return folder


@torch.no_grad()
def attended(model: PreTrainedModel, pairs: list[list[int]]) -> torch.Tensor:
    """Return what each named head attends to of the sound: (pairs, queries, keys)."""
    model.set_attn_implementation("eager")
    out = model(**read(model, TOKENS.flip(1)), decoder_input_ids=TOKENS, output_attentions=True)
    return torch.stack([out.cross_attentions[layer][0, head] for layer, head in pairs])


def named(folder: Path) -> list[list[int]]:
    found: list[list[int]] = json.loads((folder / "generation_config.json").read_text())["alignment_heads"]
    return found


PAIRS = [[1, 3], [0, 2], [0, 1], [1, 0]]


@pytest.mark.parametrize("grouping", ["similar", "contiguous"])
@pytest.mark.parametrize("method", ["mean", "svd"])
def test_word_timestamps_are_read_off_the_heads_they_were_read_off(
    grouping: str, method: str, save_tiny: Save, tmp_path: Path
) -> None:
    source = with_alignment(save_tiny("whisper", decoder_attention_heads=6), PAIRS)
    wanted = attended(twin_heads(source), PAIRS)
    with_alignment(source, PAIRS)  # transformers wrote its own
    convert(str(source), tmp_path / "out", Request("gqa", 3, method, grouping=grouping))
    after = named(tmp_path / "out")
    assert (after == PAIRS) == (grouping == "contiguous")
    if grouping == "similar":
        torch.testing.assert_close(attended(load(tmp_path / "out"), after), wanted, atol=1e-5, rtol=1e-5)


def test_queries_that_share_a_head_are_counted_one_by_one(save_tiny: Save, tmp_path: Path) -> None:
    """Of 8 query heads pairs share a key/value head already, and move together."""
    pairs = [[0, 5], [1, 6], [0, 0]]
    source = with_alignment(save_tiny("whisper", decoder_attention_heads=8, d_model=64), pairs)
    convert(str(source), tmp_path / "four", Request("gqa", 4))
    model = load(tmp_path / "four")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".decoder." in name and ("k_proj" in name or "v_proj" in name):
                heads = value.view(4, 8, -1)
                heads[2:] = heads[:2].clone()
    model.save_pretrained(tmp_path / "twins")
    with_alignment(tmp_path / "twins", pairs)
    convert(str(tmp_path / "twins"), tmp_path / "two", SIMILAR)
    after = named(tmp_path / "two")
    assert after != pairs
    torch.testing.assert_close(attended(load(tmp_path / "two"), after), attended(model, pairs), atol=1e-5, rtol=1e-5)


def test_a_run_that_was_cut_off_remembers_where_heads_went(
    save_tiny: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_alignment(save_tiny("whisper"), PAIRS)
    twin_heads(source)
    with_alignment(source, PAIRS)
    request = Request("gqa", 2, grouping="similar", max_shard_size=30_000)
    convert(str(source), tmp_path / "whole", request)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2

    make, made = pipeline.LayerMaker.make, []

    def failing(self: Any, layer: int) -> Any:
        made.append(layer)
        if len(set(made)) > 3:
            raise UptrainError("cut off")
        return make(self, layer)

    monkeypatch.setattr(pipeline.LayerMaker, "make", failing)
    monkeypatch.setattr(pipeline, "_workers", lambda: 1)
    with pytest.raises(UptrainError, match="cut off"):
        convert(str(source), tmp_path / "out", request)
    monkeypatch.setattr(pipeline.LayerMaker, "make", make)
    assert convert(str(source), tmp_path / "out", request).resumed
    assert named(tmp_path / "out") == named(tmp_path / "whole") != PAIRS
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None and sorted(manifest["stages"][-1]["head_order"]) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("pairs", "what"), [([[0, 4]], "head 4"), ([[2, 0]], "layer 2"), ([[1]], "alignment_heads")])
def test_pairs_that_name_no_head_are_refused_where_heads_move(pairs: Any, what: str, save_tiny: Save) -> None:
    source = with_alignment(save_tiny("whisper"), pairs)
    with pytest.raises(CheckpointError, match=what):
        plan_conversion(str(source), SIMILAR)
    plan_conversion(str(source), Request("gqa", 2))


def test_tensors_and_settings_that_count_heads_keep_them_in_their_places(tmp_path: Path) -> None:
    sinks = {**small_tensors(), "model.layers.1.self_attn.sinks": np.zeros(4, np.float32)}
    source = str(save_small(tmp_path / "sinks", tensors=sinks))
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.sinks"):
        plan_conversion(source, SIMILAR)
    source = str(save_small(tmp_path / "pruned", pruned_heads={"0": [1]}))
    with pytest.raises(UsageError, match="pruned_heads"):
        plan_conversion(source, SIMILAR)
    plain = save_small(tmp_path / "plain", pruned_heads={})
    plan_conversion(str(plain), SIMILAR)
    (plain / "generation_config.json").write_text(json.dumps({"alignment_heads": [[0, 1]]}))
    with pytest.raises(UsageError, match="alignment_heads"):
        plan_conversion(str(plain), SIMILAR)
