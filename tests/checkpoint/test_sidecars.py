"""One rule says which files go along, and what it leaves out is named; asked of transformers' own loaders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tests.corpus import checkpoint, tokenizer
from tests.small import digests, save_small
from uptrain.checkpoint import sidecars as rule
from uptrain.checkpoint.manifest import read_manifest, verify
from uptrain.checkpoint.sidecars import copy_sidecars, sidecars_of
from uptrain.checkpoint.source import resolve
from uptrain.cli.app import run
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import Conversion, convert
from uptrain.conversion.run.options import RunOptions
from uptrain.errors import CheckpointError, UptrainError
from uptrain.models import loading
from uptrain.models.opened import open_model
from uptrain.models.saving import save

GQA2 = Request("gqa", 2)
ALONG = (
    "USE_POLICY.md", "Llama-Licence.TXT", "LICENSE.pdf", "COPYING", "NOTICE", "tekken.json", "tokenizer.model.v3",
    "additional_chat_templates/rag.jinja", "chat_template.jinja", "generation_config.json", "vocab.pt.json",
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json", "LICENSES/one.txt",
    "tokenization_mine.py", "spelling.py", "parts/pieces.py", "qwen.tiktoken", "configuration.json", "requirements.txt",
)  # fmt: skip
LEFT = {
    rule.WEIGHTS: (
        "consolidated.00.pth", "consolidated.safetensors", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "a.GGUF",
        "flax_model.msgpack", "rust_model.ot", "model.onnx_data", "model.ckpt.data-00000-of-00001",
        "2_Dense/pytorch_model.bin",
        "original/params.txt", "onnx/config.json", "onnx/model.onnx", "second/config.json", "second/model.safetensors",
        "second/deep/readable.txt", "model.mlpackage/Manifest.json",
    ),
    rule.TRAINING: (
        "training_args.bin", "trainer_state.json", "optimizer.pt", "rng_state_0.pth", "scheduler.pt", "train_log.jsonl",
        "checkpoint-500/config.json", "runs/Nov30/events.out.tfevents.1", "all_results.json",
    ),
    rule.STALE: ("pytorch_model.bin.index.json", "eval.json", "uptrain.json.sig", "params.json", "adapter_config.json"),
    rule.CODE: ("modeling_mine.py", "kernel.cu"),
    rule.CARD: ("README.md", "readme_zh.md", "loss.png", "assets/figure.PDF"),
    rule.ARCHIVE: ("logs.tar.gz",),
    rule.HIDDEN: (".gitattributes", ".git/config", "__pycache__/x.txt", "tokenizer.json.tmp"),
}  # fmt: skip


def with_configs(folder: Path) -> Path:
    """Write what names code and folders: a tokenizer's module, which imports two others, and sentence-transformers'."""
    folder.mkdir(exist_ok=True)
    mine = {"AutoTokenizer": ["tokenization_mine.Slow", "tokenization_mine.Fast"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": mine}))
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_mine.Model"}}))
    (folder / "tokenization_mine.py").write_text("from .spelling import spell\nimport os\n")
    (folder / "spelling.py").write_text("if True:\n    from .parts.pieces import cut\n")
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling"},
        {"path": "2_Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "repository"])
def test_each_file_goes_along_or_is_named_with_its_reason(remote: bool, tmp_path: Path) -> None:
    folder = with_configs(tmp_path / "model")
    names = [*ALONG, *(name for group in LEFT.values() for name in group)]
    for name in () if remote else names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    listed = [*names, "tokenizer_config.json", "config.json", "model.safetensors"] if remote else None
    found = sidecars_of(folder, listed, ["model.safetensors"], dry=remote)
    assert set(found.copied) == {*ALONG, "tokenizer_config.json"}
    wanted = {reason: set(group) for reason, group in LEFT.items()}
    if not remote:  # folders that nobody looks into are named themselves
        wanted[rule.HIDDEN] = {".git/" if name == ".git/config" else name for name in wanted[rule.HIDDEN]}
        wanted[rule.HIDDEN] = {"__pycache__/" if name[:3] == "__p" else name for name in wanted[rule.HIDDEN]}
    assert {reason: set(group) for reason, group in found.left_out.items()} == wanted
    kept = sidecars_of(folder, listed, ["model.safetensors"], keeps_class=True, dry=remote)
    assert set(kept.copied) - set(found.copied) == {"modeling_mine.py"}


def test_a_summary_is_short(tmp_path: Path) -> None:
    listed = [f"onnx/{number}.onnx" for number in range(300)] + [f"a{number}.bin" for number in range(40)]
    listed += ["README.md", "a.pt", "b.pth", "c.h5", "d.ot", "e.onnx"]
    text = sidecars_of(tmp_path, listed).summary()
    assert "onnx/ (300 files), *.bin (40 files), a.pt" in text and "2 more" in text and "README.md" in text
    assert len(text) < 200


def test_links_lead_into_the_folder_the_cache_or_another_checkpoint_only(tmp_path: Path) -> None:
    secret = tmp_path / "home"
    secret.mkdir()
    (secret / "id_rsa").write_text("secret")
    other = save_small(tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    folder = tmp_path / "hub" / "models--a--b" / "snapshots" / "sha"
    folder.mkdir(parents=True)
    save_small(folder)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("terms")
    goals = {
        "NOTICE": secret / "id_rsa", "id_rsa": secret / "id_rsa", "LICENSE": blobs / "abc", "folder": secret,
        "tokenizer.json": other / "tokenizer.json", "merges.txt": other / "tokenizer.json",
        "inside.txt": folder / "there.txt", "loop.txt": folder / "loop.txt", "gone.txt": tmp_path / "nowhere",
    }  # fmt: skip
    (folder / "there.txt").write_text("text")
    for name, goal in goals.items():
        (folder / name).symlink_to(goal)
    os.mkfifo(folder / "vocab.txt")
    found = sidecars_of(folder, None, ["model.safetensors"])
    assert set(found.copied) == {"LICENSE", "tokenizer.json", "inside.txt", "there.txt"}
    assert set(found.left_out[rule.LINK]) == {
        "NOTICE", "id_rsa", "loop.txt", "merges.txt", "gone.txt", "folder/", "vocab.txt",
    }  # fmt: skip
    copy_sidecars(folder, found, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms" and not (tmp_path / "out" / "LICENSE").is_symlink()


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/etc/x.txt", "line\nbreak.txt"])
def test_names_that_leave_the_folder_or_that_nobody_can_print_stay(name: str, tmp_path: Path) -> None:
    assert sidecars_of(tmp_path, [name], dry=True).left_out == {rule.ODD: (name,)}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"auto_map": 3}', '{"auto_map": {"AutoTokenizer": [null, 5, "x"]}}', "[[[" * 9999]
)
def test_broken_configs_go_along_as_they_are(text: str, tmp_path: Path) -> None:
    source = save_small(tmp_path / "src")
    for name in ("tokenizer_config.json", "modules.json"):
        (source / name).write_text(text)
    out = convert(str(source), tmp_path / "out", GQA2).out
    assert all((out / name).read_text() == text for name in ("tokenizer_config.json", "modules.json"))


OWN = (
    "from transformers import PreTrainedTokenizerFast\nfrom .helper import NAME\n"
    "class Mine(PreTrainedTokenizerFast):\n    pass\n"
)


def with_own_tokenizer(folder: Path, where: str) -> Path:
    """Give a checkpoint a tokenizer of its own class, which a config of this name says."""
    (folder / "tokenization_mine.py").write_text(OWN)
    (folder / "helper.py").write_text("NAME = 'mine'\n")
    (folder / "modeling_mine.py").write_text("raise SystemExit('not to be run')\n")
    path = folder / where
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.Mine"]}
    if where == "config.json":
        config["auto_map"]["AutoModel"] = "modeling_mine.Mine"
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"], ids=["stock class", "class of our own"])
def test_a_tokenizer_of_its_own_class_loads_from_the_result(where: str, model_type: str, tmp_path: Path) -> None:
    source = with_own_tokenizer(checkpoint(tmp_path / "src", model_type), where)
    ids = AutoTokenizer.from_pretrained(source, trust_remote_code=True)("the quick brown fox")["input_ids"]
    done = convert(str(source), tmp_path / f"out-{model_type}-{where}", GQA2)
    # transformers 5 looks for the class in tokenizer_config.json only, transformers 4 in config.json too.
    name = json.loads((done.out / where).read_text())["auto_map"]["AutoTokenizer"][1]
    loaded = get_class_from_dynamic_module(name, done.out).from_pretrained(done.out)
    assert type(loaded).__name__ == "Mine" and loaded("the quick brown fox")["input_ids"] == ids
    if where == "tokenizer_config.json":
        assert type(AutoTokenizer.from_pretrained(done.out, trust_remote_code=True)).__name__ == "Mine"
    assert done.sidecars.left_out[rule.CODE] == ("modeling_mine.py",) and not (done.out / "modeling_mine.py").exists()
    own = json.loads((done.out / "config.json").read_text()).get("auto_map", {})
    assert "modeling_mine" not in json.dumps(own)
    verify(done.out)


def test_named_chat_templates_and_their_folder_come_through_convert_and_train(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "src", "llama")
    words = AutoTokenizer.from_pretrained(source)
    templates = {"default": "{{ messages }}", "rag": "R {{ messages }}"}
    words.chat_template = templates
    words.save_pretrained(source)
    (source / "notes").mkdir()
    (source / "notes" / "USE_POLICY.md").write_text("be kind")
    done = convert(str(source), tmp_path / "gqa", GQA2)
    assert AutoTokenizer.from_pretrained(done.out).chat_template == templates
    model = loading.load_model(open_model(resolve(str(done.out))))
    trained = tmp_path / "trained"
    trained.mkdir()
    save(model, words, trained, torch.float32, resolve(str(done.out)))
    assert AutoTokenizer.from_pretrained(trained).chat_template == templates
    assert (trained / "notes" / "USE_POLICY.md").read_text() == "be kind"
    files = (read_manifest(done.out) or {})["files"]
    assert {"additional_chat_templates/rag.jinja", "notes/USE_POLICY.md"} <= files.keys()
    digest = files["notes/USE_POLICY.md"]["checksum"]
    assert (read_manifest(done.out) or {})["stages"][0]["source"]["files"]["notes/USE_POLICY.md"] == digest


def test_training_keeps_our_modelling_file_and_leaves_what_was_measured(tmp_path: Path) -> None:
    done = convert(str(checkpoint(tmp_path / "src", "gpt2")), tmp_path / "gqa", GQA2)
    (done.out / "eval.json").write_text("{}")
    (done.out / "optimizer.pt").write_text("")
    source, trained = resolve(str(done.out)), tmp_path / "trained"
    trained.mkdir()
    save(loading.load_model(open_model(source)), tokenizer(), trained, torch.float32, source)
    names = {path.name for path in trained.iterdir()}
    assert {"modeling_uptrain_gpt2.py", "uptrain_shared.py"} <= names
    assert (
        not {
            "eval.json",
            "optimizer.pt",
            "uptrain.json",
        }
        & names
    )


def test_what_sentence_transformers_reads_goes_along_with_its_own_weights(tmp_path: Path) -> None:
    source = save_small(tmp_path / "src")
    for name in ("1_Pooling", "2_Dense"):
        (source / name).mkdir()
        (source / name / "config.json").write_text(json.dumps({"in_features": 8, "pooling_mode_lasttoken": True}))
    save_file({"linear.weight": torch.eye(8)}, source / "2_Dense" / "model.safetensors")
    parts = [{"path": name, "type": "mine.Part"} for name in ("1_Pooling", "2_Dense")]
    (source / "modules.json").write_text(json.dumps(parts))
    (source / "mine.py").write_text("class Part: ...\n")
    out = convert(str(source), tmp_path / "out", GQA2).out
    before, after = digests(source), digests(out)
    assert {name for name in before if before[name] == after.get(name)} == {
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json", "mine.py",
    }  # fmt: skip
    verify(out)


def test_what_was_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_small(tmp_path / "src")
    for name in ("README.md", "consolidated.00.pth", "USE_POLICY.md"):
        (source / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    for options in (["--dry-run"], []):
        assert run(["convert", "src", "out", "--groups", "2", "--json", *options]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["goes_along"] == ["USE_POLICY.md"]
        assert facts["left_out"] == {rule.WEIGHTS: ["consolidated.00.pth"], rule.CARD: ["README.md"]}
    for options in (["--dry-run"], ["--overwrite"]):
        assert run(["convert", "src", "out", "--groups", "2", *options]) == 0
        shown = capsys.readouterr().out
        assert "consolidated.00.pth" in shown and "README.md" in shown
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("join", [False, True])
def test_a_run_that_was_cut_off_takes_them_along_when_it_is_repeated(
    join: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_small(tmp_path / "src", 2)
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "terms.txt").write_text("terms")
    module: Any = import_module("uptrain.conversion.run.companions")
    real: Callable[..., None] = module.copy_sidecars

    def cut_off(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_sidecars", cut_off)
        with pytest.raises(UptrainError):
            convert(str(source), tmp_path / "out", GQA2, options=RunOptions(join=join))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "stranger.txt").write_text("not the source's")
    done: Conversion = convert(str(source), tmp_path / "out", GQA2, options=RunOptions(join=join))
    assert len(done.resumed) == 2 and done.sidecars.copied == ("a/b/terms.txt",)
    assert (done.out / "a/b/terms.txt").read_text() == "terms" and not (done.out / "stranger.txt").exists()
    verify(done.out)


def test_a_file_that_goes_while_others_are_copied_ends_in_a_sentence(tmp_path: Path) -> None:
    source = save_small(tmp_path / "src")
    (source / "terms.txt").write_text("terms")
    found = sidecars_of(source, None, ["model.safetensors"])
    (source / "terms.txt").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"terms\.txt"):
        copy_sidecars(source, found, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_large_file_counts_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_small(tmp_path / "src")
    with (source / "tokenizer.model").open("wb") as file:
        file.truncate(5 * 2**20)
    usage = type("Usage", (), {"free": 3 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UptrainError, match="disk is too full"):
        convert(str(source), tmp_path / "out", GQA2)
    (source / "tokenizer.model").unlink()
    convert(str(source), tmp_path / "out", GQA2)
