"""The weights we read are those that transformers' own `from_pretrained` reads, or we refuse and say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import tiny_config, tiny_model
from tests.hub_server import serve
from tests.oracle import pool_model
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.source import Source
from uptrain.checkpoint.weight_files import find_weights
from uptrain.conversion import convert, plan_conversion
from uptrain.conversion.request import Request
from uptrain.errors import CheckpointError
from uptrain.models.opened import open_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GQA2 = Request("gqa", 2)
Save = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def shard(folder: Path, parts: dict[str, Tensors], listed: dict[str, str] | None = None, index: str = INDEX) -> Path:
    """Replace the weights of `folder` by shards; `listed` changes what the index says of some tensors."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    weight_map: dict[str, str] = {}
    for name, tensors in parts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {**weight_map, **(listed or {})}}))
    return folder


def halves(folder: Path) -> tuple[Tensors, Tensors]:
    found = list(load_file(folder / SINGLE).items())
    return dict(found[::2]), dict(found[1::2])


def stale(folder: Path, with_shards: bool) -> None:
    """Put an index of another model's shards beside the single file, and the shards too."""
    other = folder.with_name("stale")
    tiny_model(tiny_config("llama"), seed=9).save_pretrained(other, max_shard_size="20KB")
    for path in other.glob("model-*" if with_shards else "no shards"):
        shutil.copy(path, folder)
    shutil.copy(other / INDEX, folder)


def rest_in(name: str) -> Callable[[Path], None]:
    return lambda folder: shard(folder, dict(zip(("one.safetensors", name), halves(folder), strict=True))) and None


def twice(folder: Path, change: float = 0.0, listed: bool = False) -> None:
    """Let a tensor stand in both shards, the first copy changed; `listed` lets the index name the first."""
    one, two = halves(folder)
    name = next(iter(two))
    one = {**one, name: two[name] + change}
    shard(folder, {"a.safetensors": one, "b.safetensors": two}, {name: "a.safetensors"} if listed else {})


def unlisted(folder: Path) -> None:
    """Leave a tensor out of the index that lies in a listed shard, and list one in the wrong shard."""
    one, two = halves(folder)
    shard(folder, {"a.safetensors": one, "b.safetensors": two}, {next(iter(one)): "b.safetensors"})
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][next(iter(two))]
    (folder / INDEX).write_text(json.dumps(index))


def explicit(name: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        found = load_file(folder / SINGLE)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            shard(folder, {"part.safetensors": found}, index=name)
        else:
            save_file(found, folder / name, {"format": "pt"})
        save_file({key: value + 1 for key, value in found.items()}, folder / SINGLE, {"format": "pt"})

    return put


READ: dict[str, Callable[[Path], Any]] = {
    "a stale index": lambda folder: stale(folder, False),
    "a stale index and its shards": lambda folder: stale(folder, True),
    "a shard in a subfolder": rest_in("sub/two.safetensors"),
    "a shard that sorts first": rest_in("0.safetensors"),
    "a tensor in two shards": twice,
    "a tensor in two shards that differ, the later one listed": lambda folder: twice(folder, 1.0),
    "a tensor in two equal shards, the earlier one listed": lambda folder: twice(folder, listed=True),
    "a tensor that the index does not list": unlisted,
    "a file that config.json names": explicit("other.safetensors"),
    "a file in a subfolder that config.json names": explicit("sub/other.safetensors"),
    "an index that config.json names": explicit("other.safetensors.index.json"),
}


@pytest.mark.parametrize("put", READ.values(), ids=READ.keys())
def test_what_is_read_is_what_transformers_reads(put: Callable[[Path], Any], save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama")
    put(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True).eval()
    state, checkpoint = model.state_dict(), open_checkpoint(source)
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(torch.from_numpy(checkpoint.read(name)), tensor), name
    out = convert(str(source), tmp_path / "out", GQA2).out
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = pool_model(model, 2)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
    assert (found - wanted).abs().max() < 1e-5
    # Nothing of what transformers ignores goes along, and the manifest names what was read.
    config = json.loads((out / "config.json").read_text())
    assert "transformers_weights" not in config
    listed = {name for name in json.loads((out / "uptrain.json").read_text())["files"] if "safetensors" in name}
    assert listed == {path.name for path in out.glob("*safetensors*")}
    assert (out / INDEX).exists() == (len(list(out.glob("*.safetensors"))) > 1)
    named = json.loads((out / "uptrain.json").read_text())["stages"][0]["source"]["files"]
    assert {name for name in named if name.endswith(".safetensors")} == set(checkpoint.files)
    assert (INDEX in named) == (checkpoint.index == INDEX)


@pytest.mark.parametrize(("model_type", "head"), [("llama", "lm_head.weight"), ("t5", "lm_head.weight")])
def test_an_index_may_list_a_tied_head_that_no_shard_holds(model_type: str, head: str, save_tiny: Save) -> None:
    source = save_tiny(model_type, tie_word_embeddings=True)
    found = load_file(source / SINGLE)
    assert head not in found
    shard(source, {"a.safetensors": found}, {head: "a.safetensors"})
    assert plan_conversion(str(source), Request("mqa"))[1].absent == (head,)


@pytest.mark.parametrize(
    ("listed", "tied"), [("lm_head.weight", False), ("model.layers.0.mlp.up_proj.weight", True), ("ghost", True)]
)
def test_an_index_that_lists_what_is_missing_is_refused(listed: str, tied: bool, save_tiny: Save) -> None:
    source = save_tiny("llama", tie_word_embeddings=tied)
    found = load_file(source / SINGLE)
    found.pop(listed, None)
    shard(source, {"a.safetensors": found}, {listed: "a.safetensors"})
    with pytest.raises(CheckpointError, match=listed):
        plan_conversion(str(source), GQA2)


def only(*names: str) -> Callable[[Path], Any]:
    def put(folder: Path) -> None:
        for name in names[1:]:
            shutil.copy(folder / SINGLE, folder / name)
        (folder / SINGLE).rename(folder / names[0])

    return put


def missing_shard(folder: Path) -> None:
    rest_in("sub/two.safetensors")(folder)
    (folder / "sub/two.safetensors").unlink()


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard that is absent": (missing_shard, r"sub/two\.safetensors"),
    "two copies that differ, the earlier one listed": (lambda folder: twice(folder, 1.0, True), "different"),
    "shards without an index": (only("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), "index"),
    "a variant": (only("model.fp16.safetensors"), "fp16"),
    "a sharded variant": (only("model.bf16-00001-of-00002.safetensors"), "bf16"),
    "another name": (only("consolidated.safetensors"), r"consolidated\.safetensors.*rename"),
    "another format": (only("model-q4.gguf"), r"model-q4\.gguf"),
}  # fmt: skip


@pytest.mark.parametrize(("put", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_read_is_named(put: Callable[[Path], Any], says: str, save_tiny: Save) -> None:
    source = save_tiny("llama")
    put(source)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_checkpoint(source)
    assert caught.value.hint
    # eval, train and load() ask the same before transformers does.
    with pytest.raises(CheckpointError, match=says):
        open_model(Source(source, "src", "folder"))


def test_shards_of_a_distributed_checkpoint_are_not_passed_over(save_tiny: Save) -> None:
    """transformers reads them before model.safetensors, so what we would convert is not what others see."""
    from transformers.distributed.checkpoint import is_sharded_checkpoint

    source = save_tiny("llama")
    assert not is_sharded_checkpoint(source)
    shutil.copy(source / SINGLE, source / "shard-00000-model-00001-of-00001.safetensors")
    assert is_sharded_checkpoint(source)
    with pytest.raises(CheckpointError, match="distributed checkpoint"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/other.safetensors", "away/other.safetensors", "model.bin", 3, ["a"]]
)
def test_config_json_can_only_name_weights_below_it(name: Any, save_tiny: Save, tmp_path: Path) -> None:
    source = save_tiny("llama")
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path, tmp_path / "elsewhere"):
        shutil.copy(source / SINGLE, place / "other.safetensors")
    (source / "away").symlink_to(tmp_path / "elsewhere")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    with pytest.raises(CheckpointError, match="in its own folder"):
        open_checkpoint(source)


def test_transformers_order_is_ours() -> None:
    names = [SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"]
    for first in range(len(names)):
        assert find_weights(set(names[first:]), {}, "x", True).file == names[first]


@pytest.mark.slow
@pytest.mark.parametrize("put", ["a stale index and its shards", "a shard in a subfolder"])
def test_headers_on_the_hub_are_of_the_same_files(
    put: str, save_tiny: Save, uptrain_against: Callable[..., Any]
) -> None:
    source = save_tiny("llama")
    READ[put](source)
    with serve(source, "org/tiny") as (endpoint, _):
        remote = uptrain_against(endpoint, "convert", "org/tiny", "--groups", "2", "--dry-run", "--json")
        assert remote.returncode == 0, remote.stderr
        local = uptrain_against(endpoint, "convert", str(source), "--groups", "2", "--dry-run", "--json")
        done = uptrain_against(endpoint, "convert", "org/tiny", "--groups", "2")
        assert done.returncode == 0, done.stderr
    found, wanted = (json.loads(each.stdout) for each in (remote, local))
    assert found["shards"] == wanted["shards"]
