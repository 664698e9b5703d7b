"""OUT appears whole or not at all, and uptrain.json proves what is in it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from uptrain.checkpoint.checksum import Checksum, checksum_file
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.manifest import MANIFEST, append_stage, read_manifest, verify
from uptrain.checkpoint.output_folder import partial_of, staged_output
from uptrain.checkpoint.shard_writer import ShardContents, write_shard
from uptrain.errors import CheckpointError, UptrainError, UsageError, VerificationError


def test_a_shard_reads_back_through_safetensors_and_its_digest_is_the_file_s(tmp_path: Path) -> None:
    tensors = {"ü.weight": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.int64), "none": torch.zeros(0)}
    codes = {torch.float32: "F32", torch.int64: "I64"}
    infos = [TensorInfo(name, codes[t.dtype], tuple(t.shape), "", -1, -1) for name, t in tensors.items()]
    checksum, path = Checksum("blake3"), tmp_path / "model.safetensors"

    def chunks(name: str) -> list[memoryview]:
        return [memoryview(tensors[name].numpy().tobytes())]

    write_shard(path, ShardContents(tensors=infos, chunks=chunks), checksum, lambda count: None)
    back = load_file(path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert checksum.text() == f"blake3:{blake3(path.read_bytes()).hexdigest()}" == checksum_file(path)
    assert checksum_file(path, "sha256") == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert not list(tmp_path.glob("*.tmp"))


def test_a_tensor_of_the_wrong_size_never_becomes_a_file(tmp_path: Path) -> None:
    info = TensorInfo("a", "F32", (2,), "", -1, -1)
    with pytest.raises(UptrainError, match="off its planned size"):
        contents = ShardContents(tensors=[info], chunks=lambda name: [memoryview(b"1234")])
        write_shard(tmp_path / "m.safetensors", contents, Checksum(), lambda n: None)
    assert not (tmp_path / "m.safetensors").exists()


def test_out_stands_only_after_the_block_and_an_error_leaves_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), staged_output(out) as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    assert not out.exists() and (partial_of(out) / "a").exists()
    with staged_output(out) as folder:
        assert list(folder.glob("a")) == []
        (folder / "b").write_text("2")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["b"] and not partial_of(out).exists()


def test_overwrite_keeps_the_old_folder_until_the_new_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(UsageError, match="--overwrite"), staged_output(out):
        pass
    with pytest.raises(RuntimeError), staged_output(out, overwrite=True):
        assert (out / "old").exists()
        raise RuntimeError
    assert (out / "old").read_text() == "old"
    with staged_output(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_crash_between_the_two_renames_of_an_overwrite_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.uptrain-replaced").mkdir()
    (tmp_path / "out.uptrain-replaced" / "old").write_text("old")
    with pytest.raises(UsageError, match="exists"), staged_output(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_two_runs_cannot_write_one_out(tmp_path: Path) -> None:
    with staged_output(tmp_path / "out") as folder:
        (folder / "mine").write_text("")
        with pytest.raises(UsageError, match=r"[Aa]nother"), staged_output(tmp_path / "out"):
            pass
        assert (folder / "mine").exists()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    with staged_output(out) as folder:
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
        (folder / "config.json").write_text("{}")
        append_stage(folder, None, {"stage": "convert"})
    return out


def test_history_is_carried_on(written: Path, tmp_path: Path) -> None:
    with staged_output(tmp_path / "next") as folder:
        (folder / "config.json").write_text("{}")
        append_stage(folder, written, {"stage": "train"})
    manifest = read_manifest(tmp_path / "next")
    assert manifest is not None and [stage["stage"] for stage in manifest["stages"]] == ["convert", "train"]
    assert all("python" in stage["versions"] for stage in manifest["stages"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest["files"])
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda out: flip(out / "model.safetensors"), "checksum"),
        (lambda out: os.truncate(out / "model.safetensors", 100), "100 bytes"),
        (lambda out: (out / "model.safetensors").unlink(), "missing"),
        (lambda out: (out / "extra.safetensors").write_text(""), "added"),
        (lambda out: (out / "evil.py").write_text(""), "added"),
        (lambda out: (out / "adapter_config.json").write_text("{}"), "added"),
        (lambda out: edit(out / MANIFEST, lambda files: files.update({"../x": {"size": 1}})), "outside"),
        (lambda out: edit(out / MANIFEST, lambda files: files["config.json"].pop("checksum")), "checksum"),
    ],
)
def test_verify_names_what_changed(damage: Callable[[Path], object], says: str, written: Path) -> None:
    assert set(verify(written)["files"]) == {"model.safetensors", "config.json"}
    damage(written)
    with pytest.raises(VerificationError, match=says) as caught:
        verify(written)
    assert caught.value.exit_code == 3


def test_verify_without_a_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"uptrain\.json"):
        verify(tmp_path)
