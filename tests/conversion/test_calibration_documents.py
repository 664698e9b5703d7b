"""Documents that lie in one calibration block are apart: each layer sees what it sees of each document alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conversion.test_calibrate import FAMILY_NAMES, opened, save
from uptrain.conversion.calibration.layer_runner import LayerRunner
from uptrain.data.boundary import Boundary

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
def test_a_layer_gives_for_each_document_what_transformers_gives_for_it_alone(tmp_path, model_type):
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
                    seen = torch.cat(list(parts), dim=1)
                    for span in spans(block):
                        one = whole(block[None, span], output_hidden_states=True, output_attentions=True)
                        hidden, attention = one.hidden_states[index][0], one.attentions[index][0]
                        torch.testing.assert_close(states[number][span], hidden, rtol=1e-4, atol=1e-5)
                        torch.testing.assert_close(seen[:, span, span], attention, rtol=1e-4, atol=1e-5)
                states = [layer.on(number).run(hidden) for number, hidden in enumerate(states)]
