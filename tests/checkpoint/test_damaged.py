"""Files that are not what they are called, or that change while they are read: each is one sentence that names them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.small import save_small, small_tensors
from uptrain.checkpoint.checksum import FollowingChecksum, checksum_file
from uptrain.checkpoint.header import read_header
from uptrain.checkpoint.jsonfile import JSON_LIMIT, read_json
from uptrain.checkpoint.manifest import read_manifest
from uptrain.checkpoint.output_folder import staged_output
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.source import resolve
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import CheckpointError, UptrainError, UsageError

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("read", [read_header, read_json, checksum_file], ids=lambda one: one.__name__)
@pytest.mark.parametrize("kind", ["folder", "absent", "unreadable"])
def test_what_is_no_file(read: Callable[[Path], Any], kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        path.write_bytes(b"{}")

        def refused(*args: Any, **kwargs: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refused)
        monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read(path)


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff\0\0\0\0\0\0\0{}"])
def test_a_header_that_does_not_fit_its_file(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="cut short or not safetensors"):
        read_header(tmp_path / "a.safetensors")


def test_a_json_file_larger_than_any_real_one_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(JSON_LIMIT + 1)
    with pytest.raises(CheckpointError, match="larger than"):
        read_json(tmp_path / "config.json")


def test_a_file_that_ends_while_it_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_small(tmp_path / "src"))
    last = max(checkpoint.tensors.values(), key=lambda info: info.end)
    path = tmp_path / "src" / last.file
    following = FollowingChecksum(path)
    os.truncate(path, last.end - 1)
    with pytest.raises(CheckpointError, match=f"ends inside tensor {re.escape(last.name)}"):
        checkpoint.read(last.name)
    with pytest.raises(CheckpointError, match="shorter"):
        list(following.follow(last.end, []))
    path.unlink()
    with pytest.raises(CheckpointError, match=f"at tensor {re.escape(last.name)}"):
        checkpoint.read(last.name)
    with pytest.raises(CheckpointError, match="can't be read"):
        following.text()


def test_a_row_that_a_tensor_has_not(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_small(tmp_path / "src"))
    assert np.array_equal(checkpoint.read_rows(EMBEDDING, [15]), small_tensors()[EMBEDDING][15:])
    with pytest.raises(CheckpointError, match="16 rows"):
        checkpoint.read_rows(EMBEDDING, [16])


@pytest.mark.parametrize(
    "manifest",
    [
        {"format": 99, "stages": [], "files": {}},
        {"format": 1, "stages": {}, "files": {}},
        {"format": 1, "stages": ["convert"], "files": {}},
        {"format": 1, "stages": [], "files": []},
        {"format": 1, "stages": [{"loss": float("nan")}], "files": {}},
    ],
)
def test_a_manifest_of_another_kind(manifest: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "uptrain.json").write_text(json.dumps({"format": 1, "stages": [], "files": {}}))
    assert read_manifest(tmp_path) is not None
    (tmp_path / "uptrain.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not an uptrain manifest"):
        read_manifest(tmp_path)


def test_a_folder_of_somebody_else_is_not_written_into(tmp_path: Path) -> None:
    source, partial = save_small(tmp_path / "src"), tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"out\.partial"):
        convert(str(source), tmp_path / "out", Request("gqa", 2))
    assert (partial / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UptrainError, match="Permission denied"), staged_output(tmp_path / "out", overwrite=False):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out.partial/model.safetensors"))


def save_pickle(folder: Path, value: Any) -> Path:
    save_small(folder)
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")
    return folder


WEIGHT = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("value", "noun"),
    [
        ([WEIGHT], "named tensors"),
        ({"a": 1}, "named tensors"),
        ({1: WEIGHT}, "named tensors"),
        ({"a": WEIGHT.to_sparse()}, "named tensors"),
        ({"a": WEIGHT.to(torch.complex64)}, "complex64"),
    ],
    ids=["list", "number", "key", "sparse", "complex"],
)
def test_a_pickle_of_something_else_than_weights(value: Any, noun: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=noun):
        open_checkpoint(save_pickle(tmp_path / "src", value), allow_pickle=True)


@pytest.mark.parametrize("model", ["x" * 5000, "\0", "~nobody-of-that-name/model"])
def test_names_that_no_folder_can_have(model: str) -> None:
    with pytest.raises(UsageError, match=r"(can't be the name of a|is neither a) folder"):
        resolve(model)


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "~/absent", "a/b/c"])
def test_folders_that_are_not_there_are_not_looked_for_on_the_hub(model: str) -> None:
    with pytest.raises(UsageError, match="no folder"):
        resolve(model)
