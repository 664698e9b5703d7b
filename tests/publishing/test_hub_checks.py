"""A folder that nobody should get from the Hub is refused, with the file or tensor named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from uptrain.checkpoint.manifest import append_stage
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import CheckpointError, VerificationError
from uptrain.publishing.hub.checks import check_folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert("demo", tmp_path_factory.mktemp("hub") / "demo-gqa4", Request("gqa", 4)).out


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


def remade(folder: Path) -> None:
    """Write the manifest anew, so that what was changed is what it lists."""
    append_stage(folder, folder, {"stage": "edit"})


@pytest.mark.slow
def test_a_converted_folder_passes_and_all_its_weights_are_looked_at(folder: Path) -> None:
    seen: list[int] = []
    checkpoint, manifest = check_folder(folder, seen.append)
    assert sum(seen) == sum(info.nbytes for info in checkpoint.tensors.values())
    assert manifest["stages"][-1]["stage"] == "convert"


def test_a_flipped_byte_is_a_mismatch(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(VerificationError, match=r"model\.safetensors.*checksum"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors", "modeling_uptrain_gpt2.py"])
def test_a_missing_file_is_a_mismatch(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(VerificationError, match=re.escape(name)):
        check_folder(folder)


@pytest.mark.slow
def test_a_folder_whose_manifest_never_had_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    remade(folder)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        check_folder(folder)


@pytest.mark.slow
def test_a_tokenizer_that_does_not_load_or_knows_no_word_is_refused(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[:2000])
    remade(folder)
    with pytest.raises(CheckpointError, match="no tokenizer that transformers can load"):
        check_folder(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    remade(folder)
    with pytest.raises(CheckpointError, match="has no vocabulary"):
        check_folder(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer_config.json", "preprocessor_config.json"])
def test_code_that_a_tokenizer_or_processor_names_must_be_there_and_is_not_run(kind: str, folder: Path) -> None:
    auto = "AutoTokenizer" if kind == "tokenizer_config.json" else "AutoProcessor"
    (folder / kind).write_text(json.dumps({"auto_map": {auto: "reading_mine.Mine"}}))
    remade(folder)
    with pytest.raises(CheckpointError, match=r"reading_mine\.py"):
        check_folder(folder)
    (folder / "reading_mine.py").write_text("from .cutting import cut\nraise SystemExit('not to be run')\n")
    remade(folder)
    with pytest.raises(CheckpointError, match=r"cutting\.py"):
        check_folder(folder)
    (folder / "cutting.py").write_text("cut = 1\n")
    remade(folder)
    notes: list[str] = []
    check_folder(folder, on_note=notes.append)
    assert any("not checked" in note for note in notes) == (auto == "AutoTokenizer")


def test_without_transformers_a_tokenizer_is_not_tried_and_that_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    notes: list[str] = []
    check_folder(folder, on_note=notes.append)
    assert "transformers" in " ".join(notes)


def test_files_that_unpickle_are_refused_even_if_listed(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"")
    remade(folder)
    with pytest.raises(CheckpointError, match=r"training_args\.bin"):
        check_folder(folder)
    (folder / "training_args.bin").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        check_folder(folder)


def test_a_config_that_the_manifest_forgot_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "uptrain.json").read_text())
    del manifest["files"]["config.json"]
    (folder / "uptrain.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=r"config\.json"):
        check_folder(folder)


def test_folders_that_uptrain_did_not_write_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no folder"):
        check_folder(tmp_path / "nowhere")
    (folder / "uptrain.json").unlink()
    with pytest.raises(CheckpointError, match=r"uptrain\.json"):
        check_folder(folder)


@pytest.mark.slow
def test_nan_in_a_folder_is_refused_with_the_tensor_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[3]
    tensors[name].flat[-1] = np.nan
    save_file(tensors, folder / "model.safetensors")
    remade(folder)
    with pytest.raises(CheckpointError, match=name):
        check_folder(folder)
