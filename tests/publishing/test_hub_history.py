"""The commands on a model card make the model again: they are run here, or read back by what would run them."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import checkpoint
from uptrain.checkpoint.checksum import checksum_file
from uptrain.cli import app
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import UptrainError
from uptrain.publishing.hub.history import hub_parents, reproduction_commands, since_public
from uptrain.training import recipes

SHA = "c0ffee" * 6 + "beef"


def stages_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "uptrain.json").read_text())["stages"]
    return found


@pytest.mark.parametrize(
    "request_",
    [
        Request("gqa"),
        Request("gqa", 2, method="first", dtype="float32", max_shard_size=1_000_000),
        Request("mqa", method="svd", grouping="similar", seed=3),
        Request("mqa", method="calibrated", calibrate="a text.txt", calibration_tokens=7, repair_steps=0),
        Request("gqa", 4, method="calibrated", repair="blocks"),
        Request("mla", cache=0.3333333333333333, key_weight=1.5, engine="llama.cpp", rope="grid"),
        Request("mla", kv_lora_rank=8, qk_rope_head_dim=4, q_lora_rank=6, method="calibrated"),
    ],
    ids=lambda request: f"{request.target}-{request.method}",
)
def test_the_convert_command_asks_for_the_same(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def plan_conversion(model: str, request: Request, **options: Any) -> None:
        asked.extend((model, request, options))
        raise UptrainError("enough")

    monkeypatch.setattr(import_module("uptrain.conversion.run.prepare"), "plan_conversion", plan_conversion)
    source = {"name": "org/a b", "origin": "hub", "revision": SHA, "files": {"pytorch_model.bin": "…"}}
    heads = {"before": 8, "after": request_.groups or 4}
    stage = {"stage": "convert", "source": source, "request": asdict(request_), "num_key_value_heads": heads}
    (step,) = reproduction_commands([stage], "out")
    assert app.run(shlex.split(step.command)[1:]) == 1
    model, found, options = asked
    # The default number of groups is spelled out.
    assert found == (Request("gqa", 4) if request_ == Request("gqa") else request_)
    assert (model, options["revision"], options["allow_pickle"]) == ("org/a b", SHA, True)


def test_repeating_the_commands_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    half = convert("demo", "half", Request("gqa", 4, method="svd")).out
    done = convert("half", "done", Request("mqa")).out
    found = reproduction_commands(since_public(stages_of(done)), "again")
    assert [step.command.split()[2] for step in found] == ["demo", "./again-step1"]
    for step in found:
        assert app.run(shlex.split(step.command)[1:]) == 0
    for one, other in ((half, tmp_path / "again-step1"), (done, tmp_path / "again")):
        assert checksum_file(one / "model.safetensors") == checksum_file(other / "model.safetensors")


def test_the_recipe_is_the_one_that_was_run_on_the_model_before(tmp_path: Path) -> None:
    recipe = recipes.parse_recipe(
        {"model": "/home/me/half", "output": "/home/me/done", "data": ["python-stdlib"], "steps": 3, "batch_size": 2,
         "learning_rate": 1e-5, "overwrite": True}
    )  # fmt: skip
    first = {"stage": "convert", "source": {"name": "demo", "origin": "demo"}, "request": asdict(Request("mqa"))}
    stage = {"stage": "train", "recipe": recipe.to_dict(), "source": "/home/me/half", "revision": None}
    _, step = reproduction_commands([first, {**stage, "num_processes": 2}], "done")
    assert step.command == "torchrun --nproc_per_node 2 -m uptrain train recipe.yaml"
    (tmp_path / step.recipe_file).write_text(step.recipe)
    again = recipes.load_recipe(str(tmp_path / step.recipe_file))
    changed = {"model": "./done-step1", "output": Path("done"), "overwrite": False}
    assert again == recipe.model_copy(update=changed)
    # A model on the Hub is named with the commit that was trained.
    (step,) = reproduction_commands([{**stage, "source": "org/half", "revision": SHA}], "done")
    (tmp_path / "hub.yaml").write_text(step.recipe)
    again = recipes.load_recipe(str(tmp_path / "hub.yaml"))
    assert (again.model, again.revision, step.command) == ("org/half", SHA, "uptrain train recipe.yaml")


def test_a_private_path_does_not_show(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "secret" / "llama", "llama")
    stages = stages_of(convert(str(source), tmp_path / "out", Request("mqa")).out)
    (step,) = reproduction_commands(stages, "out")
    assert step.command.startswith("uptrain convert ./llama ./out") and "secret" not in step.command
    (step,) = reproduction_commands(stages, "out", "org/llama")
    assert step.command.startswith("uptrain convert org/llama ./out")


def test_every_hub_model_on_the_way_counts_and_the_nearest_is_the_base() -> None:
    first = {"stage": "convert", "source": {"name": "org/a", "origin": "hub", "revision": SHA}}
    local = {"stage": "train", "source": "./half", "revision": None}
    second = {"stage": "train", "source": "org/b", "revision": SHA}
    assert [parent.name for parent in hub_parents([first, local, second, local])] == ["org/b", "org/a"]
    assert since_public([first, local, second, local]) == [second, local]
    assert since_public([local, local]) == [local, local]
