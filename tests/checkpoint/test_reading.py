"""A checkpoint is untrusted input: each way it can be wrong is one sentence, and no byte is read outside it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from uptrain.checkpoint.dtypes import as_float32, cast
from uptrain.checkpoint.header import read_header
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.weight_files import check_shard_name
from uptrain.errors import CheckpointError, UptrainError

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def folder(path: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors or {"a": torch.arange(6.0).view(2, 3)}, path / "model.safetensors")
    return path


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_gives_the_bytes_that_safetensors_gives(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5).to(dtype), "a": torch.randn(7).to(dtype), "empty": torch.zeros(0, 4).to(dtype)}
    checkpoint = open_checkpoint(folder(tmp_path / "c", tensors))
    for name, tensor in load_file(tmp_path / "c" / "model.safetensors").items():
        ours = checkpoint.read(name)
        assert ours.shape == tuple(tensor.shape)
        assert ours.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert b"".join(bytes(chunk) for chunk in checkpoint.chunks(name)) == ours.tobytes()
        rows = range(len(tensor))[::2]
        assert checkpoint.read_rows(name, rows).tobytes() == ours[::2].tobytes()


def test_a_sharded_checkpoint_reads_as_one(tmp_path: Path) -> None:
    path = folder(tmp_path / "c")
    (path / "model.safetensors").unlink()
    for number in (1, 2):
        save_file({f"t{number}": torch.full((2,), float(number))}, path / f"model-{number}.safetensors")
    index = {"weight_map": {"t1": "model-1.safetensors", "t2": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(path)
    assert [checkpoint.read(f"t{number}").tolist() for number in (1, 2)] == [[1, 1], [2, 2]]
    (path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", "cut"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"12345678x", "longer"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678", "takes 12"),
        ({"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}, b"12345678", "Q4"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"12345678", "shape"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"12345678", "shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"12345678", "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, b"12345678", "tensor"),
        ({"a": 3}, b"", "object"),
        (
            {
                "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            b"123456",
            "overlap",
        ),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}', b"1", "twice"),
        (b"[" * 100_000, b"", "JSON"),
        (b"\xff\xfe", b"", "JSON"),
        (b"[1]", b"", "object"),
    ],
)
def test_each_wrong_header_is_one_sentence(header: Any, data: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        read_header(raw(tmp_path / "model.safetensors", header, data))
    assert "model.safetensors" in caught.value.message and "\n" not in caught.value.message


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = raw(tmp_path / "model.safetensors", b"{}", length=200 * 10**6)
    with path.open("r+b") as file:
        file.truncate(300 * 10**6)  # sparse: reading it would cost 200 MB of memory
    with pytest.raises(CheckpointError, match="200,000,000 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors", "/etc/model.safetensors", "sub/../../model.safetensors", "..\\m.safetensors",
        "away/model.safetensors", "./model.safetensors", "sub//model.safetensors", "loop/model.safetensors",
        "C:\\m.safetensors", "C:m.safetensors", "model.bin", "a\0.safetensors", 3, None,
    ],
)  # fmt: skip
def test_an_index_can_only_name_files_beside_it(name: Any, tmp_path: Path) -> None:
    path = folder(tmp_path / "c")
    (path / "model.safetensors").unlink()
    folder(tmp_path / "elsewhere")
    (path / "away").symlink_to(tmp_path / "elsewhere")
    (path / "loop").symlink_to("loop")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="in its own folder"):
        open_checkpoint(path)


@pytest.mark.slow
@given(st.text(max_size=30))
def test_accepted_shard_names_stay_inside_the_folder(name: str) -> None:
    try:
        check_shard_name(Path("i.json"), name + ".safetensors", ".safetensors")
    except CheckpointError:
        return
    inside = Path("/some/folder")
    assert inside in (inside / (name + ".safetensors")).resolve().parents


def test_pickles_only_on_request_and_never_run(tmp_path: Path) -> None:
    path = folder(tmp_path / "c")
    (path / "model.safetensors").unlink()
    torch.save({"a": torch.arange(4.0).view(2, 2).T}, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(path)
    assert open_checkpoint(path, allow_pickle=True).read("a").tolist() == [[0, 2], [1, 3]]

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (path / "ran",))

    torch.save({"a": Evil()}, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can't be read as weights"):
        open_checkpoint(path, allow_pickle=True)
    assert not (path / "ran").exists()


def test_no_config_and_no_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1))
def test_widening_bfloat16_equals_ml_dtypes(bits: list[int]) -> None:
    array = np.array(bits, np.uint16).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(as_float32(array), array.astype(np.float32))


def test_a_cast_that_would_overflow_is_refused() -> None:
    with pytest.raises(UptrainError, match=r"1e\+05.*F16"):
        cast(np.array([1.0, 1e5], np.float32), "F16", "w")
    assert cast(np.array([np.inf], np.float32), "F16", "w")[0] == np.inf
