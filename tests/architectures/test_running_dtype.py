"""A cache is priced by the dtype its model runs in, which is what transformers loads it in by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.small import save_small, small_tensors
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.inspection import inspect
from uptrain.conversion.request import Request
from uptrain.evaluation.speed import cache_bytes_per_token
from uptrain.publishing.page.models import find_models

WIDE = {"hidden_size": 8, "vocab_size": 64}


@pytest.mark.parametrize("groups", [4, 2], ids=["unchanged", "shared"])
@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (np.float32, {}), (np.float32, {"dtype": "float32"}), (np.float16, {}), (np.float32, {"dtype": "bfloat16"}),
        (np.float16, {"torch_dtype": "float32"}),
    ],
    ids=["fp32", "fp32 said", "fp16", "fp32 run in bf16", "fp16 run in fp32"],
)  # fmt: skip
def test_the_cache_is_what_the_loaded_model_fills(
    groups: int, stored: Any, said: dict[str, Any], tmp_path: Path
) -> None:
    source = save_small(tmp_path / "source", tensors=small_tensors(dtype=stored, **WIDE), **WIDE, **said)
    _, _, plan = plan_conversion(str(source), Request("gqa", groups))
    out = convert(str(source), tmp_path / "out", Request("gqa", groups)).out
    held = [cache_bytes_per_token(AutoModelForCausalLM.from_pretrained(folder))[0] for folder in (source, out)]
    assert [plan.cache_before, plan.cache_after] == held
    assert [inspect(str(folder)).cache_bytes_per_token for folder in (source, out)] == held
    (stage,) = json.loads((out / "uptrain.json").read_text())["stages"]
    assert list(stage["cache_bytes_per_token"].values()) == held
    (subject,) = find_models(out)
    assert subject.itemsize * sum(layer.cache_values_per_token for layer in subject.layers) == held[1]


@pytest.mark.parametrize("groups", [4, 2])
def test_another_dtype_prices_both_alike(groups: int, tmp_path: Path) -> None:
    source = save_small(tmp_path / "source", dtype="float32")
    _, _, plan = plan_conversion(str(source), Request("gqa", groups, dtype="float16"))
    assert (plan.itemsize, plan.cache_after / plan.cache_before) == (torch.float16.itemsize, groups / 4)
