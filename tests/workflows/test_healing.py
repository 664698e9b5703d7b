"""`convert --heal`: the result is the healed model, whole or not at all, and a run that was stopped goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import uptrain
from tests.conftest import tiny_config, tiny_model
from tests.conversion.test_families import load
from uptrain.checkpoint.events import Events
from uptrain.checkpoint.manifest import read_manifest, verify
from uptrain.checkpoint.source import DEMO
from uptrain.cli.app import run
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.conversion.run.prepare import plan_conversion
from uptrain.data.sources import Builtin, Files
from uptrain.errors import Interrupted, UsageError
from uptrain.models.checks import longest_context
from uptrain.training.run import train
from uptrain.training.run_folder import RunFolder
from uptrain.workflows.healing.run import Healing, convert_and_heal
from uptrain.workflows.healing.settings import HealSettings

SHORT = HealSettings(tokens=256, block_size=32)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a tiny model with the demo's tokenizer, next to a text."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "source"
    tiny_model(tiny_config("llama", max_position_embeddings=128, vocab_size=4096)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    Path("text.txt").write_text(Path(shutil.__file__).read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return folder


def request(**changes: Any) -> Request:
    wanted = {"target": "mqa", "method": "calibrated", "calibrate": "text.txt", "calibration_tokens": 512}
    return Request(**{**wanted, "repair_steps": 1, **changes})


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"target": "mla", "cache": 0.5}], ids=["heads", "latent"])
def test_the_result_is_what_convert_and_train_give_one_after_the_other(source, tmp_path, changes):
    done = convert_and_heal(str(source), SHORT, "out", request(**changes))
    assert names(tmp_path) == {"source", "text.txt", "out"}
    assert done.conversion.out == Path("out") and done.training is not None and done.training.tokens == 256
    verify(Path("out"))
    manifest = read_manifest(Path("out"))
    assert manifest is not None
    converting, training = manifest["stages"]
    assert converting["request"]["method"] == "calibrated" and training["recipe"]["tokens"] == 256
    # The oracle: the two commands that the stages record.
    convert(str(source), "converted", request(**changes))
    recipe = Healing(
        planned=plan_conversion(str(source), request(**changes)), out=Path("trained"), settings=SHORT
    ).recipe
    train(recipe.model_copy(update={"model": "converted"}))
    one, two = weights("out"), weights("trained")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert longest_context(load(Path("out"))) == 128


@pytest.mark.slow
def test_healing_brings_the_predictions_closer_to_the_sources(source):
    settings = HealSettings(tokens=4096, block_size=32, learning_rate=1e-3)
    convert(str(source), "converted", request())
    convert_and_heal(str(source), settings, "out", request())
    tokens = torch.randint(5, 4096, (4, 64), generator=torch.Generator().manual_seed(0))

    def divergence(folder: str) -> float:
        with torch.no_grad():
            ours, theirs = (load(Path(each))(tokens).logits.log_softmax(-1) for each in (folder, source))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    assert divergence("out") < divergence("converted")


class _Stop(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_stopped_healing_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch, overwrite):
    convert_and_heal(str(source), SHORT, "whole", request())
    settings = replace(SHORT, overwrite=overwrite)
    if overwrite:
        shutil.copytree("whole", "out")
        Path("out/mark").touch()

    with pytest.raises(Interrupted):
        convert_and_heal(str(source), settings, "out", request(), events=Events(step=_interrupt))
    assert Path("out").exists() == overwrite == Path("out/mark").exists()
    with monkeypatch.context() as patch:
        patch.setattr("uptrain.workflows.healing.run.run_plan", None)  # what is converted is not converted again
        done = convert_and_heal(str(source), settings, "out", request())
    assert done.training is not None and 0 < done.training.resumed_from < 8
    one, two = weights("out"), weights("whole")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert names(tmp_path) == {"source", "text.txt", "out", "whole"}


@pytest.mark.slow
def test_a_stopped_conversion_writes_nothing_and_goes_on(source, tmp_path, monkeypatch):
    build = import_module("uptrain.conversion.run.build")

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_companions", stop)
        with pytest.raises(Interrupted):
            convert_and_heal(str(source), SHORT, "out", request())
    assert not Path("out").exists() and not Path("out.uptrain-unhealed").exists()
    convert_and_heal(str(source), SHORT, "out", request())
    assert names(tmp_path) == {"source", "text.txt", "out"}


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_result_stood_only_tidies(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("uptrain.training.run_folder.RunFolder.remove", _killed)
        with pytest.raises(_Stop):
            convert_and_heal(str(source), SHORT, "out", request())
    before = weights("out")
    assert names(tmp_path) > {"out", "out.uptrain-unhealed", "out.run"}
    done = convert_and_heal(str(source), SHORT, "out", request())
    assert done.training is None and names(tmp_path) == {"source", "text.txt", "out"}
    assert all(torch.equal(value, before[name]) for name, value in weights("out").items())
    with pytest.raises(UsageError, match="exists"):
        convert_and_heal(str(source), SHORT, "out", request())


def _killed(folder: Any) -> None:
    raise _Stop


@pytest.mark.slow
def test_an_unfinished_training_of_something_else_is_not_lost(source):
    convert(str(source), "other", request(repair_steps=0))
    recipe = Healing(planned=plan_conversion(str(source), request()), out=Path("out"), settings=SHORT).recipe
    other = recipe.model_copy(update={"model": "other"})
    with pytest.raises(Interrupted):
        train(other, events=Events(step=_interrupt))
    with pytest.raises(UsageError, match=r"out\.run"):
        convert_and_heal(str(source), SHORT, "out", request())
    assert Path("out.run").is_dir() and not Path("out.uptrain-unhealed").exists()
    convert_and_heal(str(source), replace(SHORT, overwrite=True), "out", request())
    assert Path("out").is_dir() and not Path("out.run").exists()


def _interrupt(step: Any) -> None:
    if step.step == 3:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("words", "noun"),
    [
        ("--to mqa --method svd --heal 64", "heal"),
        ("--to gqa --groups 4 --method calibrated --heal 64", "heal"),
        ("--to mqa --calibrate text.txt --heal 0", "heal"),
        ("--to mqa --calibrate text.txt --heal 64 --join", "join"),
    ],
)
def test_what_cannot_be_healed_is_refused_before_anything_is_written(source, tmp_path, capsys, words, noun):
    assert run(["convert", str(source), "out", *words.split()]) == 2
    assert noun in capsys.readouterr().err
    assert names(tmp_path) == {"source", "text.txt"}


def test_a_dry_run_says_what_healing_takes(source, tmp_path, capsys):
    words = "--to mqa --calibrate text.txt --heal 1000 --dry-run --json"
    assert run(["convert", str(source), "out", *words.split()]) == 0
    found = capsys.readouterr()
    assert "8 steps of 128 tokens" in found.err and json.loads(found.out)["out"] == "out"
    assert names(tmp_path) == {"source", "text.txt"}


def test_several_texts_are_healed_on_by_their_weights_and_conversations_as_such(source):
    rows = [{"messages": [{"role": "user", "content": f"What is {number}?"}]} for number in range(9)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    planned = plan_conversion(str(source), request(calibrate="text.txt:3,chats.jsonl,builtin:0.5"))
    first, second, third = SHORT.recipe(planned, Path("a"), Path("b")).data
    assert isinstance(first, Files) and first.files == "text.txt" and first.weight == 3
    assert isinstance(second, Files) and second.chat_field == "messages" and second.weight == 1
    assert isinstance(third, Builtin) and third.split == "train" and third.weight == 0.5
    (alone,) = SHORT.recipe(plan_conversion(str(source), request(calibrate="text.txt:3")), Path("a"), Path("b")).data
    assert isinstance(alone, Files) and alone.files == "text.txt" and alone.weight is None


def test_longer_healing_has_larger_steps_and_wider_models_smaller_ones(source):
    planned = plan_conversion(str(source), request())
    recipes = [HealSettings(tokens=tokens).recipe(planned, Path("a"), Path("b")) for tokens in (1000, 2**20)]
    assert [recipe.batch_size for recipe in recipes] == [1, 4]
    wide = planned.plan.source.config | {"hidden_size": 5760}
    wider = planned._replace(plan=replace(planned.plan, source=replace(planned.plan.source, config=wide)))
    assert HealSettings(tokens=9).recipe(wider, Path("a"), Path("b")).learning_rate == pytest.approx(3e-5)
    assert {"convert_and_heal", "HealSettings"} <= set(uptrain.__all__)


def test_overwriting_does_not_delete_the_folder_of_a_run_in_progress(source):
    first = Healing(planned=plan_conversion(str(source), request()), out=Path("out"), settings=SHORT)
    folder = RunFolder(Path("out"))
    folder.open(first.recipe)
    with pytest.raises(UsageError, match=r"out\.run"):
        convert_and_heal(str(source), replace(SHORT, overwrite=True), "out", request(calibration_tokens=256))
    assert (folder.path / "recipe.json").is_file() and not Path("out.uptrain-unhealed").exists()
    folder.remove()
