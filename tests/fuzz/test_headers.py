"""A safetensors header that lies about anything, and an index that points anywhere."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from tests.fuzz.attempt import attempt, inputs
from tests.fuzz.hostile import NAMES, NUMBERS, as_json, damaged, values
from uptrain.checkpoint.header import ITEM_BITS, read_header
from uptrain.checkpoint.reader import open_checkpoint

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [0, 5], "data_offsets": [32, 32]},
    "d": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
LENGTHS = st.sampled_from([None, None, None, None, 0, 1, 7, 2**31, 2**63, 2**64 - 1, 100_000_001])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, 2**63 - 1]), max_size=4) | st.just([1] * 200)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """Return a header whose every entry is of the right kind, so that only sizes, types and spans can lie."""
    out: dict[str, Any] = {}
    position = 0
    for _ in range(draw(st.integers(0, 3))):
        dtype, shape = draw(st.sampled_from([*ITEM_BITS, "Q4", ""])), draw(SHAPES)
        size = int(np.prod([float(side) for side in shape])) * ITEM_BITS.get(dtype, 8) // 8
        begin = draw(st.sampled_from([position, position, 0, 8, *(n for n in NUMBERS if type(n) is int)]))
        end = draw(st.sampled_from([begin + size, begin + size, begin, 2**63]))
        position = end
        name = draw(st.sampled_from(NAMES) | st.text(max_size=5))
        out[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return out


def lie(header: bytes, data: int = 4) -> Callable[[Any], Any]:
    """Try a header that once was not refused as it should be."""
    return example(header=header, length=None, data=data)


@given(
    header=as_json(entries() | damaged(HEADER, ("e",))),
    length=LENGTHS,
    data=st.sampled_from([40, 40, 40, 0, 39, 41, 100]),
)
@inputs(600)
@lie(b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}')  # a TypeError
@lie(b'{"a":{"dtype":"F32","shape":' + json.dumps([2**62] * 1000).encode() + b',"data_offsets":[0,4]}}')
@lie(b'{"a":{"dtype":"F32","shape":[0,9223372036854775807,3],"data_offsets":[0,0]}}', 0)  # numpy's ValueError
@lie(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}')  # can't be written again
@lie(b'{"a\\u001b[2J\\n":{"dtype":"U8","shape":[3],"data_offsets":[0,4]}}')  # would clear the screen
def test_a_header_is_right_or_refused(header: bytes, length: int | None, data: int, tmp_path: Path) -> None:
    """What is accepted is what the safetensors library reads too."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(data))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found, _ = attempt(read_header, path)
    if found is None:
        return
    checkpoint = open_checkpoint(tmp_path)
    try:
        with safe_open(path, "numpy") as theirs:
            assert set(theirs.keys()) == set(found)
            for name, info in found.items():
                assert tuple(theirs.get_slice(name).get_shape()) == info.shape
    except SafetensorError:
        return  # it is stricter about names and its metadata
    for name, info in found.items():
        assert checkpoint.read(name).nbytes == info.nbytes == sum(map(len, checkpoint.chunks(name)))


INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
SHARDS = [
    "one.safetensors",
    "two.safetensors",
    "link.safetensors",
    "out.safetensors",
    "pipe.safetensors",
    "dir.safetensors",
    "sub/three.safetensors",
    "away/three.safetensors",
]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return a folder of three shards, links to them, to a device and to a folder outside, a pipe and a folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "sub").mkdir()
    (tmp_path / "outside").mkdir()
    (folder / "away").symlink_to(tmp_path / "outside")
    for name, file in (("a", "one"), ("b", "two"), ("c", "sub/three"), ("c", "away/three")):
        header = json.dumps({name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
        (folder / f"{file}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (folder / "link.safetensors").symlink_to("one.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "out.safetensors").symlink_to("/dev/zero")
    (folder / "dir.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    return folder


maps = st.dictionaries(
    st.sampled_from(["a", "b", "c"]) | st.text(max_size=4), st.sampled_from([*SHARDS, *NAMES]) | values
)


@pytest.mark.slow
@given(index=as_json(damaged(INDEX, ("weight_map",)) | maps.map(lambda weight_map: {"weight_map": weight_map})))
@inputs(350)
@example(index=b'{"weight_map": {"a": "one.safetensors", "b": "' + b"x" * 300 + b'.safetensors"}}')
@example(index=b'{"weight_map": {"a": "loop.safetensors"}}')
@example(index=b'{"weight_map": {"a": "pipe.safetensors"}}')  # waits for ever when opened
@example(index=b'{"weight_map": {"a": ["one.safetensors"]}}')
def test_an_index_leads_nowhere_but_below_it(index: bytes, shards: Path) -> None:
    (shards / "model.safetensors.index.json").write_bytes(index)
    found, _ = attempt(open_checkpoint, shards)
    if found is not None:
        assert all(shards in (shards / file).parent.resolve().joinpath("x").parents for file in found.files)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "/dev/zero", "nothing", "loop"])
def test_a_file_that_is_no_file(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to(path if kind == "loop" else kind)
    assert attempt(open_checkpoint, tmp_path)[1]
