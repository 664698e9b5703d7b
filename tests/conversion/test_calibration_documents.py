"""Documents that lie in one calibration block are apart: each layer sees what it sees of each document alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from tests.conversion.test_calibrate import FAMILY_NAMES, QUICK, as_if_all_were_made, opened, save, tokens
from tests.conversion.test_calibrate_latent import every_component, prepared
from uptrain.architectures.mla_rope import MLARope
from uptrain.checkpoint.events import Events
from uptrain.conversion.calibration import attention_probabilities, isolation
from uptrain.conversion.calibration.engine import calibrate
from uptrain.conversion.calibration.layer_runner import LayerRunner
from uptrain.conversion.calibration.layer_search import LayerSearch
from uptrain.conversion.calibration.statistics import gather_moments, latent_moments
from uptrain.conversion.calibration_settings import CalibrationSettings
from uptrain.data.boundary import Boundary
from uptrain.methods.head_conversion import ModuleWeights, maps_of
from uptrain.methods.mla import LatentShape

END = Boundary(1, ends=True)
CPU = torch.device("cpu")
TOGETHER = {"bloom", "falcon", "mpt", "opt"}
"""Families whose class can't keep documents apart."""


def documents() -> torch.Tensor:
    """Return three blocks: of four documents, of one that goes on, and of documents of one and two tokens."""
    ids = torch.randint(2, 64, (3, 24), generator=torch.Generator().manual_seed(0))
    ids[0, [4, 14, 15]] = ids[2, [0, 2, 23]] = 1
    return ids


def spans(block: torch.Tensor) -> list[slice]:
    """Return where the documents of a block are: each ends with token 1."""
    ends = [index + 1 for index, token in enumerate(block.tolist()) if token == 1]
    places = [0, *ends] + ([len(block)] if not ends or ends[-1] < len(block) else [])
    return [slice(*pair) for pair in pairwise(places)]


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_a_layer_gives_for_each_document_what_transformers_gives_for_it_alone(tmp_path, model_type, monkeypatch):
    monkeypatch.setattr(attention_probabilities, "VALUES", 4 * 24 * 5)  # five queries of four heads
    folder = save(tmp_path, model_type)
    target = opened(folder, 1)
    if model_type.partition("+")[0] in TOGETHER:
        assert not LayerRunner(target.source, CPU).isolates(5)
        return
    assert LayerRunner(target.source, CPU).isolates(5)
    blocks, model = documents(), LayerRunner(target.source, CPU)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    states = list(model.embed(blocks, END))
    with torch.no_grad():
        for index in range(len(target.before)):
            with model.layer(index) as layer:
                for number, block in enumerate(blocks):
                    _, parts = layer.on(number).attention_weights(states[number])
                    # A part ends with the last key that its queries see.
                    seen = torch.cat([pad(part, (0, len(block) - part.shape[-1])) for part in parts], dim=1)
                    for span in spans(block):
                        one = whole(block[None, span], output_hidden_states=True, output_attentions=True)
                        hidden, attention = one.hidden_states[index][0], one.attentions[index][0]
                        torch.testing.assert_close(states[number][span], hidden, rtol=1e-4, atol=1e-5)
                        torch.testing.assert_close(seen[:, span, span], attention, rtol=1e-4, atol=1e-5)
                states = [layer.on(number).run(hidden) for number, hidden in enumerate(states)]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral"])
@torch.no_grad()
def test_statistics_are_those_of_each_document_in_a_block_of_its_own(tmp_path, model_type):
    target = opened(save(tmp_path, model_type), 2)
    apart = tokens(4, 12).clamp(min=2)
    apart[0::2, -1] = 1
    maps = maps_of(target.read(0))
    weights = ModuleWeights(target.source.family.projections, target.before[0]).parameters(maps)
    parameters = {name: value.float() for name, value in weights.items()}
    frequencies = torch.tensor([1.0, 0.5, 0.1, 0.01][: maps.q.shape[1] // 2]) if model_type != "gpt2" else None
    moments, latents = [], []
    for blocks in (apart, apart.view(2, 24)):
        runner = LayerRunner(target.source, CPU)
        states = list(runner.embed(blocks, END))
        with runner.layer(0) as layer:
            moments.append(gather_moments(layer, maps, parameters, 2, enumerate(states)))
            latents.append(latent_moments(layer, maps, enumerate(states), frequencies))
    pairs = [*zip(*moments, strict=True), tuple(latents)]
    for one, two in pairs:
        assert_same(one, two)


def assert_same(one: Any, two: Any) -> None:
    """Check that two statistics are equal; of two counts by distance, the longer one has nothing more."""
    for name, value in vars(one).items():
        other = getattr(two, name)
        if not isinstance(value, torch.Tensor):
            if hasattr(value, "__dict__"):
                assert_same(value, other)
            continue
        if name == "distances":
            assert not other[:, value.shape[1] :].any()
            other = other[:, : value.shape[1]]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4)


def test_a_document_weighs_its_first_token_by_its_length(tmp_path):
    target = opened(save(tmp_path, "llama"), 1)
    runner = LayerRunner(target.source, CPU)
    hidden = list(runner.embed(documents(), END))
    settings = CalibrationSettings(first_token=12.0)
    with runner.layer(0) as layer:
        search = SimpleNamespace(layer=layer, settings=settings)
        several, one, short = (LayerSearch._token_weights(search, torch.ones(24, 3), block) for block in range(3))
    assert len(hidden) == 3
    assert one.tolist() == [12.0] + [1.0] * 23
    assert [several[span].tolist()[0] for span in spans(documents()[0])] == [2.5, 5.0, 1.0, 4.0]
    assert short.tolist()[:2] == [1.0, 1.0]


def test_a_latent_attends_inside_documents(tmp_path):
    target = prepared(tmp_path, "llama", LatentShape(MLARope.NONE, 1))
    target = replace(target, shape=every_component(target))
    for _, _, report in calibrate(target, documents(), replace(QUICK, boundary=END)):
        assert report.choice.error < 1e-9


def test_layers_made_earlier_of_documents_apart_are_run_and_not_made_again(tmp_path):
    settings = replace(QUICK, repair_steps=2, boundary=Boundary(5, ends=True))
    assert (tokens() == 5).any()
    as_if_all_were_made(opened(save(tmp_path, "mistral"), 1), settings)


def test_masks_are_kept_as_bits(tmp_path):
    target = opened(save(tmp_path, "llama"), 1)
    runner = LayerRunner(target.source, CPU)
    list(runner.embed(documents(), END))
    masks = set(runner._calls._bits.values())
    assert len(masks) == 2  # of two blocks, for all layers and both implementations
    assert {len(mask) for mask in masks} == {24 * 24 // 8}


def test_a_class_that_keeps_no_documents_apart_is_named_in_a_note(tmp_path):
    target = opened(save(tmp_path, "opt"), 1)
    notes: list[str] = []
    assert isolation.boundary_in(target.source, documents(), END, Events(note=notes.append)) is None
    assert len(notes) == 1
    assert isolation.boundary_in(target.source, torch.full((2, 24), 3), END, Events(note=notes.append)) is None
    assert len(notes) == 1
