"""Of a repository, one set of weights is downloaded and what goes along; a whole cache needs no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import tiny_config, tiny_model
from tests.corpus import checkpoint
from tests.hub_server import SHA, serve
from tests.small import digests, save_small
from uptrain.checkpoint.download import weights_among
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert

Run = Callable[..., subprocess.CompletedProcess[str]]
SECOND = (
    "consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/model.safetensors",
    "original/params.json", "checkpoint-500/model.safetensors", "checkpoint-500/config.json", "onnx/model.onnx",
    "onnx/config.json", "pytorch_model.bin", "training_args.bin", "model.fp16.safetensors", "tf_model.h5", "README.md",
    "figure.png", "modeling_theirs.py", "gguf/q4.gguf", "gguf/notes.txt",
)  # fmt: skip
ALONG = ("USE_POLICY.md", "additional_chat_templates/rag.jinja", "tekken.json", "LICENCE", "1_Pooling/config.json")


@pytest.fixture
def client(tmp_path: Path) -> Run:
    """Return a function that runs the command line against an endpoint, with a cache of its own."""

    def run(endpoint: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        values = {
            **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_dummy", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", **environment,
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", "uptrain", *arguments],
            env=values, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def add(folder: Path, names: tuple[str, ...], text: str = "") -> None:
    """Write files that differ: of two that are the same, only one would be downloaded."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text or f"# {name}")


def asked_for(log: list[tuple[str, str, int]]) -> set[str]:
    """Return the files of the repository of which bytes were sent."""
    found = (unquote(path).partition("?")[0].split("/", 5) for _, path, count in log if "/resolve/" in path and count)
    return {parts[5] for parts in found}


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_one_set_of_weights_is_downloaded_and_what_goes_along(shards: int, tmp_path: Path, client: Run) -> None:
    source = save_small(tmp_path / "src", shards)
    mine = sorted(path.name for path in source.iterdir())
    add(source, SECOND)
    add(source, ALONG)
    if shards == 1:  # transformers takes the single file where both are there
        (source / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "model-00001-of-00001.safetensors"}}'
        )
        add(source, ("model-00001-of-00001.safetensors",))
    with serve(source, "org/tiny") as (endpoint, log):
        planned = client(endpoint, "convert", "org/tiny", "--groups", "2", "--dry-run", "--json")
        assert planned.returncode == 0, planned.stderr
        assert not {name for name in asked_for(log) if name.endswith((".md", ".jinja"))}
        done = client(endpoint, "convert", "org/tiny", "out", "--groups", "2", "--json", "--allow-pickle")
        assert done.returncode == 0, done.stderr
    assert asked_for(log) == {*mine, *ALONG}
    for text in (planned.stdout, done.stdout):
        facts = json.loads(text)
        assert facts["goes_along"] == sorted(ALONG)
        left = {name for names in facts["left_out"].values() for name in names}
        assert {*SECOND} <= left and not {*mine} & left
    assert all((tmp_path / "out" / name).read_text() == f"# {name}" for name in ALONG)
    if shards == 1:
        (source / "model.safetensors.index.json").unlink()
    convert(str(source), tmp_path / "local", Request("gqa", 2))
    there, here = digests(tmp_path / "out"), digests(tmp_path / "local")
    assert there.keys() == here.keys()
    assert {name for name in there if there[name] != here[name]} == {"uptrain.json"}


@pytest.mark.slow
def test_pickles_are_downloaded_where_there_is_nothing_else(tmp_path: Path, client: Run) -> None:
    source = tmp_path / "src"
    model = tiny_model(tiny_config("llama"), 0)
    model.save_pretrained(source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    add(source, ("training_args.bin", "original/pytorch_model.bin"))
    with serve(source, "org/tiny") as (endpoint, log):
        assert client(endpoint, "convert", "org/tiny", "out", "--groups", "2", "--allow-pickle").returncode == 0
    assert {name for name in asked_for(log) if name.endswith(".bin")} == {"pytorch_model.bin"}


@pytest.mark.slow
def test_code_that_a_tokenizer_names_is_downloaded_with_what_it_imports(tmp_path: Path, client: Run) -> None:
    source = save_small(tmp_path / "src")
    add(source, ("tokenization_mine.py",), "from .inner.words import split\n")
    add(source, ("inner/words.py", "modeling_mine.py"))
    auto_map = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    with serve(source, "org/tiny") as (endpoint, log):
        assert client(endpoint, "convert", "org/tiny", "out", "--groups", "2").returncode == 0
    assert {name for name in asked_for(log) if name.endswith(".py")} == {"tokenization_mine.py", "inner/words.py"}
    assert (tmp_path / "out" / "inner" / "words.py").is_file()


def cached(source: Path, hub: Path, *without: str) -> dict[str, str]:
    """Put a checkpoint into a cache as a program that keeps no list of files does; return the environment to use it."""
    snapshot = hub / "models--org--tiny" / "snapshots" / SHA
    shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns(*without))
    (hub / "models--org--tiny" / "refs").mkdir()
    (hub / "models--org--tiny" / "refs" / "main").write_text(SHA)
    return {"HF_HUB_CACHE": str(hub)}


NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(params=["by itself", "downloaded before"])
def filled(request: Any, tmp_path: Path, client: Run) -> tuple[dict[str, str], Path]:
    """Fill a cache, by hand or by an earlier run; return its environment and its snapshot."""
    source = checkpoint(tmp_path / "src", "llama")
    add(source, ("consolidated.safetensors", "USE_POLICY.md"))
    hub = tmp_path / "hub"
    if request.param == "by itself":
        environment = cached(source, hub, "consolidated.safetensors")
    else:
        environment = {"HF_HUB_CACHE": str(hub)}
        with serve(source, "org/tiny") as (endpoint, _):
            assert client(endpoint, "convert", "org/tiny", "first", "--groups", "2", **environment).returncode == 0
    return environment, hub / "models--org--tiny" / "snapshots" / SHA


@pytest.mark.slow
@pytest.mark.parametrize("offline", ["0", "1"], ids=["no network", "HF_HUB_OFFLINE"])
def test_a_whole_cache_needs_no_network(offline: str, filled: tuple[dict[str, str], Path], client: Run) -> None:
    environment = {**filled[0], "HF_HUB_OFFLINE": offline}
    for command in (
        ("inspect", "org/tiny"),
        ("convert", "org/tiny", "out", "--groups", "2", "--dry-run"),
        ("convert", "org/tiny", "out", "--groups", "2"),
    ):
        done = client(NOWHERE, *command, **environment)
        assert done.returncode == 0, done.stderr
    assert (filled[1].parents[3] / "out" / "USE_POLICY.md").is_file()


@pytest.mark.slow
def test_evaluating_and_training_need_no_network(client: Run, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "src", "llama")
    add(source, ("USE_POLICY.md",))
    environment = {**cached(source, tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog\n" * 60)
    measure = ("--text", "text.txt", "--tokens", "64", "--context", "32", "--no-speed")
    done = client(NOWHERE, "eval", "org/tiny", *measure, **environment)
    assert done.returncode == 0, done.stderr
    recipe = (
        "model=org/tiny",
        "output=trained",
        "data=[text.txt]",
        "tokens=64",
        "batch_size=1",
        "block_size=32",
        "distill=null",
    )
    done = client(NOWHERE, "train", "gqa-uptrain", *recipe, **environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "trained" / "USE_POLICY.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", [("inspect", "org/tiny"), ("convert", "org/tiny", "out", "--groups", "2")])
@pytest.mark.parametrize("offline", ["0", "1"], ids=["no network", "HF_HUB_OFFLINE"])
def test_what_is_missing_in_a_cache_is_named(
    offline: str, command: tuple[str, ...], client: Run, tmp_path: Path
) -> None:
    sharded = cached(save_small(tmp_path / "src", 2), tmp_path / "one", "model-00002-of-00002.safetensors")
    single = cached(save_small(tmp_path / "whole"), tmp_path / "two", "*.safetensors")
    bare = cached(tmp_path / "whole", tmp_path / "three", "config.json")
    for environment, name in (
        (sharded, "model-00002-of-00002.safetensors"), (single, "model.safetensors"), (bare, "config.json"),
    ):  # fmt: skip
        done = client(NOWHERE, *command, **{**environment, "HF_HUB_OFFLINE": offline})
        said = " ".join(done.stderr.split())
        assert done.returncode == 1 and "Traceback" not in said and name in said
        assert ("HF_HUB_OFFLINE" if offline == "1" else "127.0.0.1:9") in said
    nothing = client(NOWHERE, "inspect", "org/other", HF_HUB_OFFLINE="1")
    assert nothing.returncode == 1 and "HF_HUB_OFFLINE" in nothing.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_cache_with_a_list_of_files_but_not_all_of_them_says_which_stay(client: Run, tmp_path: Path) -> None:
    source = save_small(tmp_path / "src")
    add(source, ("LICENSE",))
    with serve(source, "org/tiny") as (endpoint, _):
        assert client(endpoint, "convert", "org/tiny", "first", "--groups", "2").returncode == 0
    snapshot = next((tmp_path / "hf").rglob("LICENSE"))
    snapshot.unlink()
    done = client(NOWHERE, "convert", "org/tiny", "out", "--groups", "2", "--json", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert "LICENSE" in [name for names in facts["left_out"].values() for name in names] or "cache" in done.stderr
    (snapshot.parent / "model.safetensors").unlink()
    looked = client(NOWHERE, "inspect", "org/tiny", HF_HUB_OFFLINE="1")
    assert looked.returncode == 1 and "model.safetensors" in looked.stderr and "HF_HUB_OFFLINE" in looked.stderr


@pytest.mark.slow
def test_headers_on_the_hub_are_those_of_the_files_that_would_be_downloaded(tmp_path: Path, client: Run) -> None:
    source = save_small(tmp_path / "src", 2)
    add(source, ("consolidated.safetensors", "pytorch_model.bin"))
    with serve(source, "org/tiny") as (endpoint, _):
        looked = json.loads(client(endpoint, "inspect", "org/tiny", "--json").stdout)
    local = json.loads(client(NOWHERE, "inspect", str(source), "--json").stdout)
    assert {**looked, "name": "", "origin": ""} == {**local, "name": "", "origin": ""}


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"x": 5}}'])
def test_an_index_without_shards_names_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    names = ["model.safetensors.index.json", "model.safetensors.txt", "pytorch_model.bin"]
    assert weights_among(names, tmp_path, True) == names[:1]
