"""Read a checkpoint's history: the public models it comes from, and the commands that reproduce it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from uptrain.conversion.request import option_words

Stage = Mapping[str, Any]
_DEMO = "demo"


@dataclass(frozen=True)
class Parent:
    """What a stage started from.

    - `name`: a Hub id, `demo`, or a folder; empty for nothing.
    - `origin`: `hub`, `demo`, `folder` or `nothing`.
    - `revision`: the commit of a Hub id.
    """

    name: str
    origin: str
    revision: str | None = None


@dataclass(frozen=True)
class ReproductionCommand:
    """A command and, for training, its recipe: the name of the file and its text."""

    command: str
    recipe_file: str = ""
    recipe: str = ""


def parent_of(stage: Stage) -> Parent:
    """Return what a stage started from."""
    source = stage.get("source")
    if isinstance(source, Mapping):
        return Parent(str(source.get("name")), str(source.get("origin")), source.get("revision"))
    if not source:
        return Parent("", "nothing")
    # Training records a name, and a revision only for a model of the Hub.
    revision = stage.get("revision")
    return Parent(str(source), "hub" if revision else _DEMO if source == _DEMO else "folder", revision)


def hub_parents(stages: Sequence[Stage]) -> list[Parent]:
    """Return every Hub model of a history, the latest first."""
    found = [parent_of(stage) for stage in reversed(stages)]
    return list({each.name: each for each in found if each.origin == "hub"}.values())


def since_public(stages: Sequence[Stage]) -> Sequence[Stage]:
    """Return the stages that others can repeat: those since the last one that started from the Hub or the demo."""
    for position in range(len(stages) - 1, -1, -1):
        if parent_of(stages[position]).origin in ("hub", _DEMO):
            return stages[position:]
    return stages


def reproduction_commands(stages: Sequence[Stage], name: str, base: str | None = None) -> list[ReproductionCommand]:
    """Return the commands that reproduce a checkpoint.

    - `stages`: its history.
    - `name`: the folder of the result.
    - `base`: the name to use for a source that is a folder.
    """
    out: list[ReproductionCommand] = []
    before = parent_of(stages[0]) if stages else Parent("", "nothing")
    if before.origin == "folder":
        before = Parent(base or f"./{PurePath(before.name).name}", "folder")
    for number, stage in enumerate(stages, 1):
        last = number == len(stages)
        folder = f"./{name}" if last else f"./{name}-step{number}"
        if stage.get("stage") == "convert":
            out.append(ReproductionCommand(shlex.join(_convert(stage, before, folder))))
        elif stage.get("stage") == "train":
            file = "recipe.yaml" if last else f"recipe-step{number}.yaml"
            out.append(ReproductionCommand(shlex.join(_train(stage, file)), file, _recipe(stage, before, folder)))
        else:
            out.append(ReproductionCommand(f"# {stage.get('stage')}: this version of uptrain has no such stage"))
        before = Parent(folder, "folder")
    return out


def _convert(stage: Stage, before: Parent, out: str) -> list[str]:
    words = ["uptrain", "convert", before.name, out]
    request = dict(stage.get("request", {}))
    if request.get("target") == "gqa":
        request["groups"] = stage.get("num_key_value_heads", {}).get("after", request.get("groups"))
    words += option_words(request)
    if before.revision:
        words += ["--revision", before.revision]
    if any(str(file).endswith(".bin") for file in stage.get("source", {}).get("files", ())):
        words.append("--allow-pickle")
    return words


def _train(stage: Stage, file: str) -> list[str]:
    processes = stage.get("num_processes", 1)
    if processes == 1:
        return ["uptrain", "train", file]
    return ["torchrun", "--nproc_per_node", str(processes), "-m", "uptrain", "train", file]


def _recipe(stage: Stage, before: Parent, out: str) -> str:
    recipe = {key: value for key, value in stage.get("recipe", {}).items() if key not in ("overwrite", "revision")}
    if "model" in recipe:
        recipe = {"model": before.name, **({"revision": before.revision} if before.revision else {}), **recipe}
        recipe["model"] = before.name
    recipe["output"] = out.removeprefix("./")
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
