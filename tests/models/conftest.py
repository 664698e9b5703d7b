"""Converted tiny models with their oracles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.conversion.test_families import load, request
from tests.oracle import pool_model
from uptrain.conversion.run.convert import convert


@pytest.fixture
def pair(save_tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, PreTrainedModel]]:
    """Return a function that gives a converted tiny model and its oracle."""

    def make(model_type: str, groups: int = 2, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
        source = save_tiny(model_type, **changes)
        convert(str(source), tmp_path / "out", request(groups))
        return load(tmp_path / "out"), pool_model(load(source), groups)

    return make
