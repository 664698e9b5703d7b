"""The checkpoints of a report, and what uptrain recorded about each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import ModelDescription, describe
from uptrain.architectures.running_dtype import cached_itemsize
from uptrain.checkpoint.folder_digest import weights_digest
from uptrain.checkpoint.jsonfile import read_json
from uptrain.checkpoint.manifest import EVALUATION, MANIFEST, read_manifest
from uptrain.checkpoint.reader import open_checkpoint, read_config
from uptrain.errors import CheckpointError, UsageError
from uptrain.evaluation.tables import MetricTable, interval_in, number_in, rows_of, stale_parts, weights_of

LOG = "train_log.jsonl"


@dataclass(frozen=True)
class PageModel:
    """One checkpoint: its name, history, attention, measurements (None without eval.json) and training log.

    `left_out`: sentences on measurements in eval.json that belong to other weights.
    """

    name: str
    folder: Path
    stages: list[dict[str, Any]]
    model: ModelDescription
    evaluation: Mapping[str, Any] | None
    log: list[dict[str, Any]]
    left_out: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[AttentionSpec, ...]:
        """Return the attention of every layer."""
        return self.model.attention

    @property
    def conversions(self) -> list[dict[str, Any]]:
        """Return the stages that changed the heads, the first one first."""
        return [stage for stage in self.stages if stage.get("stage") == "convert"]

    @property
    def itemsize(self) -> int:
        """Return the bytes of a cached value when the model runs in its own dtype."""
        try:
            stored = [info.dtype for info in open_checkpoint(self.folder).tensors.values()]
        except CheckpointError:  # what is measured can be shown without its weights
            stored = []
        return cached_itemsize(self.model.config, stored)

    @property
    def original_heads(self) -> int:
        """Return the key/value heads before all conversions."""
        for stage in self.conversions:
            return int(stage["num_key_value_heads"]["before"])
        return self.layers[0].num_key_value_heads

    @property
    def conditions(self) -> tuple[Any, ...]:
        """Return what two evaluations must have in common for their metrics to be comparable."""
        found = self.evaluation or {}
        names = (_mapping(found.get("baseline")).get("name"), str(found.get("texts")))
        return (*names, *(found.get(key) for key in ("context", "stride", "tokens", "dtype")))

    def metric(self, name: str, of: str = "") -> float | None:
        """Return a number of eval.json, or of its `model` or `baseline`; None if it is missing."""
        value = number_in(self._part(of), name)
        return None if value is None else float(value)

    def interval(self, name: str, of: str = "") -> tuple[float, float] | None:
        """Return an interval or a range of eval.json, or of its `model` or `baseline`; None if it is missing."""
        return interval_in(self._part(of), name)

    def rows(self, name: str) -> list[Mapping[str, Any]]:
        """Return the list `name` of eval.json; empty if it is missing."""
        return rows_of(self.evaluation, name)

    def _part(self, of: str) -> Mapping[str, Any]:
        found = self.evaluation or {}
        return _mapping(found.get(of)) if of else found


def table_of(models: Sequence[PageModel], make: Callable[[Mapping[str, Any]], MetricTable]) -> MetricTable:
    """Return one table of what `make` returns for each model's eval.json, after a column of the models' names."""
    made = [(model.name, make(model.evaluation or {})) for model in models]
    rows: list[tuple[str, ...]] = [(name, *row) for name, table in made for row in table.rows]
    return MetricTable(("checkpoint", *made[0][1].columns), rows)


def find_models(directory: Path) -> list[PageModel]:
    """Return the checkpoint in `directory`, or those in its subfolders, by name.

    Raises:
        UsageError: there is no checkpoint that uptrain wrote.
        CheckpointError: a manifest, config, eval.json or log that is broken.
    """
    found = models_in([directory, *sorted(directory.iterdir())] if directory.is_dir() else [])
    if not found:
        raise UsageError(
            f"{directory} has no checkpoint that uptrain wrote.",
            "Name a folder with an uptrain.json in it, or a folder of such folders.",
        )
    return found[:1] if found[0].folder == directory else found


def models_in(folders: Sequence[Path]) -> list[PageModel]:
    """Return the checkpoints among `folders` that uptrain wrote.

    Raises:
        CheckpointError: as `find_models`.
    """
    return [model for folder in folders if folder.is_dir() and (model := _page_model(folder)) is not None]


def _page_model(folder: Path) -> PageModel | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    model = describe(read_config(folder), str(folder))
    _ = model.attention  # a config that can't be read is refused here
    evaluation: Mapping[str, Any] | None = read_json(folder / EVALUATION) if (folder / EVALUATION).is_file() else None
    name = folder.resolve().name
    evaluation, left_out = _of_these_weights(name, folder, manifest, evaluation)
    return PageModel(name, folder, manifest["stages"], model, evaluation, _log(folder / LOG), left_out)


def _of_these_weights(
    name: str, folder: Path, manifest: Mapping[str, Any], evaluation: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Return the measurements that belong to the weights of the manifest, and sentences on the others.

    - `name`: the checkpoint's name.
    - `folder`: its folder.
    - `manifest`: its uptrain.json.
    - `evaluation`: its eval.json, or None.
    """
    measured = weights_of(evaluation or {})
    if measured and measured != weights_digest(folder, manifest["files"]):
        return None, (f"{name}: {EVALUATION} measured other weights than {MANIFEST} lists, so it is not shown.",)
    if stale := stale_parts(evaluation):
        return evaluation, (
            f"{name}: what {EVALUATION} has of other weights, or against another baseline, is not shown: "
            f"{', '.join(stale)}.",
        )
    return evaluation, ()


def _log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        raise CheckpointError(f"{path} has a line that is not JSON.", "Remove it, or train again.") from None
    return [line for line in lines if isinstance(line, dict) and "tokens" in line]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
