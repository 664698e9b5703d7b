"""Pickled weights are read in every format torch wrote, by every command, and only with permission."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import uptrain
from tests.corpus import NO_DROPOUT, checkpoint, corpus
from tests.oracle import pool_model
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.cli.app import run
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import CheckpointError

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
Save = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def old(tensors: Any, path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def turned(tensors: Tensors) -> Tensors:
    return {name: value.T.contiguous().T if value.dim() == 2 else value for name, value in tensors.items()}


def shared(tensors: Tensors) -> Tensors:
    """Let all tensors be parts of one storage, and a head be the embedding itself, as tied models were pickled."""
    flat = torch.cat([value.reshape(-1) for value in tensors.values()])
    sizes = [value.numel() for value in tensors.values()]
    parts = {
        name: part.view(value.shape)
        for (name, value), part in zip(tensors.items(), flat.split(sizes), strict=True)
    }  # fmt: skip
    return {**parts, "lm_head.weight": parts["transformer.wte.weight"]}


def trained(tensors: Tensors) -> dict[str, Any]:
    return {name: torch.nn.Parameter(value) for name, value in tensors.items()}


def shards(folder: Path, tensors: Tensors, save: Callable[[Any, Path], None] = torch.save) -> None:
    items = list(tensors.items())
    weight_map: dict[str, str] = {}
    for number, part in enumerate((dict(items[::2]), dict(items[1::2])), 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def stale(folder: Path, tensors: Tensors) -> None:
    """Put an index of other values beside the single file."""
    shards(folder, {name: value + 1 for name, value in tensors.items()})
    torch.save(tensors, folder / BIN)


WRITTEN: dict[str, Callable[[Path, Tensors], Any]] = {
    "as today": lambda folder, tensors: torch.save(tensors, folder / BIN),
    "as before torch 1.6": lambda folder, tensors: old(tensors, folder / BIN),
    "turned": lambda folder, tensors: old(turned(tensors), folder / BIN),
    "in one storage": lambda folder, tensors: torch.save(shared(tensors), folder / BIN),
    "in one storage before torch 1.6": lambda folder, tensors: old(shared(tensors), folder / BIN),
    "as parameters": lambda folder, tensors: torch.save(trained(tensors), folder / BIN),
    "in shards": shards,
    "in shards before torch 1.6": lambda folder, tensors: shards(folder, tensors, old),
    "beside a stale index": stale,
}


def pickled(source: Path, write: Callable[[Path, Tensors], Any] = WRITTEN["as before torch 1.6"]) -> Path:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    write(source, tensors)
    return source


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pickle_is_read_as_transformers_reads_it(
    write: Callable[[Path, Tensors], Any], dtype: torch.dtype, save_tiny: Save, tmp_path: Path
) -> None:
    source = pickled(save_tiny("gpt2", dtype=dtype), write)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=False)
    state, found = model.state_dict(), open_checkpoint(source, allow_pickle=True)
    for name in found.tensors:
        ours = torch.from_numpy(found.read(name).view("uint8"))
        assert torch.equal(ours, state[name].contiguous().view(torch.uint8)), name
    loaded = uptrain.load(source, allow_pickle=True)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    out = convert(str(source), tmp_path / "out", Request("mqa"), allow_pickle=True).out
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = pool_model(model.float(), 1)(ids).logits
        logits = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
    # Pooled heads are rounded to the dtype that is stored.
    assert (logits - wanted).abs().max() < (1e-5 if dtype is torch.float32 else 0.05)
    assert not list(out.glob("*.bin*"))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, str]:
    """Return a pickled source, its conversion, and a text."""
    source = pickled(checkpoint(tmp_path / "source", **NO_DROPOUT))
    assert run(["convert", str(source), str(tmp_path / "mqa"), "--to", "mqa", "--allow-pickle"]) == 0
    return source, tmp_path / "mqa", str(corpus(tmp_path / "text.txt"))


@pytest.mark.slow
def test_a_pickled_source_is_baseline_teacher_and_student_with_permission(
    pair: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, converted, text = pair
    command = ["eval", str(converted), "--baseline", str(source), "--text", text, "--no-speed", "--json"]
    settings = ["--tokens", "400", "--context", "64"]
    assert run([*command, *settings]) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert run([*command, *settings, "--allow-pickle"]) == 0
    with_pickle = json.loads(capsys.readouterr().out)
    assert with_pickle["kl"] > 0
    # It is the baseline without being named too, but not without permission.
    found = ["eval", str(converted), *command[4:], *settings]
    assert run([*found, "--allow-pickle"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] == with_pickle["kl"]
    assert run(found) == 0
    assert json.loads(capsys.readouterr().out)["kl"] is None
    # The same figures as of the same weights in safetensors.
    safe = checkpoint(tmp_path / "safe", **NO_DROPOUT)
    assert run(["eval", str(converted), "--baseline", str(safe), *command[4:], *settings]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] == with_pickle["kl"]

    values = {"model": converted, "data": f"[{text}]", "steps": 2, "block_size": 32, "batch_size": 2}
    recipe = ["train", "gqa-uptrain", *(f"{key}={value}" for key, value in values.items()), "precision=fp32"]
    assert run([*recipe, f"output={tmp_path / 'refused'}"]) == 1
    assert "allow_pickle: true" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("refused*")), "a run that was refused leaves nothing that binds the next one"
    # What uptrain.json says was allowed once is no permission: anybody may have written it.
    digests = []
    for name, teacher in (("taught", source), ("safely", safe)):
        trusted = [f"distill.teacher={teacher}", *(["allow_pickle=true"] if name == "taught" else [])]
        assert run([*recipe, f"output={tmp_path / name}", *trusted]) == 0
        digests.append((tmp_path / name / "model.safetensors").read_bytes())
    assert digests[0] == digests[1]
    assert run([*recipe, f"model={source}", f"output={tmp_path / 'again'}", "distill=null", "allow_pickle=true"]) == 0
    assert [path.name for path in (tmp_path / "again").glob("*model*")] == ["model.safetensors"]


def test_a_sweep_measures_a_pickled_source(pair: tuple[Path, Path, str], tmp_path: Path) -> None:
    source, _, text = pair
    asked = ["sweep", str(source), "--to", "mqa", "--methods", "mean", "--out", str(tmp_path / "sweep"), "--text", text]
    assert run([*asked, "--tokens", "400", "--context", "64", "--allow-pickle"]) == 0
    assert json.loads((tmp_path / "sweep/sweep.json").read_text())["arms"][0]["kl"] > 0


class Evil:
    """What makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return (Path.touch, (self.made,))


@pytest.mark.parametrize("write", [torch.save, old], ids=["zip", "before torch 1.6"])
def test_permission_runs_no_code(write: Callable[[Any, Path], None], pair: tuple[Path, Path, str]) -> None:
    source, converted, text = pair
    write({"a": Evil(source / "ran")}, source / BIN)
    for command in (["convert", str(source), str(source) + "-out"], ["inspect", str(source)]):
        assert run([*command, "--allow-pickle"]) == 1
    assert run(["eval", str(converted), "--baseline", str(source), "--text", text, "--allow-pickle"]) == 1
    with pytest.raises(CheckpointError):
        uptrain.load(source, allow_pickle=True)
    assert not (source / "ran").exists()


def test_an_index_of_pickles_leads_nowhere_else_when_transformers_loads(save_tiny: Save, tmp_path: Path) -> None:
    """transformers itself would follow the name out of the folder."""
    source = pickled(save_tiny("gpt2"), shards)
    index = json.loads((source / INDEX).read_text())
    first = min(index["weight_map"].values())
    (source / first).rename(tmp_path / "outside.bin")
    renamed = {name: "../outside.bin" if file == first else file for name, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps({**index, "weight_map": renamed}))
    assert AutoModelForCausalLM.from_pretrained(source, use_safetensors=False)
    for read in (lambda: uptrain.load(source, allow_pickle=True), lambda: open_checkpoint(source, allow_pickle=True)):
        with pytest.raises(CheckpointError, match=r"outside\.bin.*own folder"):
            read()


def test_an_index_that_transformers_cannot_read_is_named(save_tiny: Save) -> None:
    source = save_tiny("gpt2", max_shard_size="20KB")
    index = source / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    del found["metadata"]
    index.write_text(json.dumps(found))
    assert open_checkpoint(source).tensors
    with pytest.raises(CheckpointError, match="no metadata"):
        uptrain.load(source)
