"""An opened model has the config, the tensors and the quantization by which loading decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.corpus import checkpoint
from uptrain.checkpoint.source import Source
from uptrain.errors import CheckpointError
from uptrain.models.loading import load_model
from uptrain.models.opened import open_config, open_model


def source(folder: Path) -> Source:
    return Source(folder, "src", "folder")


def test_an_opened_model_holds_the_config_and_every_stored_tensor(tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = checkpoint(tmp_path / "src", "llama")
    opened = open_model(source(folder))
    assert opened.config == json.loads((folder / "config.json").read_text()) and opened.quantization is None
    assert opened.checkpoint is not None
    with safe_open(folder / "model.safetensors", "np") as stored:
        assert set(opened.checkpoint.tensors) == set(stored.keys())


def test_the_quantization_is_that_of_the_config_that_was_opened(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "src", "llama")
    opened = open_model(source(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "unheard"}}))
    assert opened.quantization is None
    again = open_model(source(folder)).quantization
    assert again is not None and again.method == "unheard"


def test_only_the_config_is_needed_where_transformers_reads_other_files(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "src", "llama")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="only the variant fp16"):
        open_model(source(folder))
    assert open_config(source(folder)).checkpoint is None
    assert open_config(source(folder)).config["model_type"] == "llama"


def test_a_folder_of_gguf_files_alone_is_refused_as_such(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "src", "llama")
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(CheckpointError, match="GGUF"):
        load_model(open_model(source(folder)))
