"""Calibrated latents on tiny models: exact where they can be, never worse for a choice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.conftest import tiny_config, tiny_model
from tests.conversion.test_calibrate import QUICK, as_if_all_were_made, opened, tokens
from uptrain.architectures.mla_rope import MLARope
from uptrain.conversion.calibration.engine import LayerReport, calibrate
from uptrain.conversion.calibration.targets import MLATarget
from uptrain.methods.mla import LatentShape

DIMS, HIDDEN = 8, 32


def prepared(folder, model_type: str, shape: LatentShape, **changes) -> MLATarget:
    tiny_model(tiny_config(model_type, **changes)).save_pretrained(folder)
    target = opened(folder, 1)
    theta = (target.source.config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    dims = target.before[0].head_dim
    frequencies = tuple(theta ** (-2 * pair / dims) for pair in range(dims // 2)) if model_type != "gpt2" else ()
    return MLATarget(source=target.source, shape=shape, inverse_frequencies=frequencies)


def run(target: MLATarget, **changes) -> list[tuple]:
    return [(maps, report) for _, maps, report in calibrate(target, tokens(), replace(QUICK, **changes))]


def every_component(target: MLATarget) -> LatentShape:
    spec = target.before[0]
    pairs = tuple(pair for pair in range(spec.head_dim // 2) for _ in range(spec.num_key_value_heads))
    return LatentShape(MLARope.DECOUPLED, spec.num_key_value_heads * spec.head_dim, pairs, nope=False)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_every_component_in_the_rotary_key_leaves_no_error(tmp_path, model_type):
    target = prepared(tmp_path, model_type, LatentShape(MLARope.NONE, 1))
    target = replace(target, shape=every_component(target))
    for maps, report in run(target):
        assert report.choice.error < 1e-9
        assert maps.k_rope.shape[0] == 2 * len(target.shape.pairs)


@pytest.mark.parametrize(
    ("model_type", "rope"), [("gpt2", MLARope.NONE), ("llama", MLARope.PRE_ROPE), ("qwen2", MLARope.PRE_ROPE)]
)
def test_a_latent_wider_than_the_input_leaves_no_error(tmp_path, model_type, rope):
    target = prepared(tmp_path, model_type, LatentShape(rope, 1))
    hidden = target.source.config.get("n_embd") or target.source.config["hidden_size"]
    target = replace(target, shape=LatentShape(rope, hidden + 1))
    for maps, report in run(target):
        assert report.choice.error < 1e-9
        assert maps.down.shape == (hidden + 1, hidden)


SHAPES = [
    ("gpt2", LatentShape(MLARope.NONE, 12)),
    ("llama", LatentShape(MLARope.PRE_ROPE, 12)),
    ("llama", LatentShape(MLARope.DECOUPLED, 8, (0, 1))),
    ("qwen2", LatentShape(MLARope.DECOUPLED, 8, (0, 0, 1))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "shape"), SHAPES)
def test_layers_made_earlier_are_run_and_not_made_again(tmp_path, model_type, shape):
    as_if_all_were_made(prepared(tmp_path, model_type, shape), replace(QUICK, repair_steps=3))


@pytest.mark.parametrize(("model_type", "shape"), SHAPES)
def test_every_choice_lowers_the_error(tmp_path, model_type, shape):
    reports: list[LayerReport] = []
    target = prepared(tmp_path, model_type, shape)
    settings = replace(QUICK, repair_steps=6)
    for _, maps, report in calibrate(target, tokens(), settings):
        reports.append(report)
        assert 0 < report.explained["calibrated"].keys < 1
        assert report.choice.error <= report.choice.error_refit <= report.choice.error_shared < float("inf")
        assert all(np.isfinite(part).all() for part in vars(maps).values() if part is not None)
    assert len(reports) == len(target.before)
