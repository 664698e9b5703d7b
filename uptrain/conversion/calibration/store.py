"""What calibration has made: each layer's heads, in a folder next to OUT until OUT is written.

A layer counts once its file and its entry in calibration.json are on the disk: a run that was cut off goes on after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from uptrain.architectures.mla_projections import LatentHeads
from uptrain.architectures.projections import Heads, LayerHeads
from uptrain.checkpoint.checksum import checksum_file
from uptrain.checkpoint.dtypes import Array
from uptrain.checkpoint.files import replaced_file, write_atomic
from uptrain.checkpoint.jsonfile import dump_json, read_json
from uptrain.checkpoint.output_folder import remove
from uptrain.conversion.calibration.made_layer import CalibratedLayer, MadeLayer
from uptrain.errors import CheckpointError
from uptrain.methods.method import ExplainedEnergy

NOTES = "calibration.json"
NOTHING: Mapping[str, Array] = MappingProxyType({})
_OTHER = "other:"
"""What the names of tensors outside attention begin with in a layer's file."""


@dataclass
class CalibratedLayers:
    """The first layers of a plan, calibrated: .npz files of float32 in `folder`, and what is recorded of each.

    - `plan`: the plan's digest.
    - `text`: describes the calibration tokens.
    - `rope_pairs`: which of the source's rotary pairs text chose, empty where nothing was chosen.
    - `notes`: what is recorded of each layer.
    - `files`: the digests of the layers' files.
    """

    folder: Path
    plan: str
    text: dict[str, Any]
    rope_pairs: tuple[int, ...] = ()
    notes: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @classmethod
    def left(cls, folder: Path, plan: str) -> CalibratedLayers | None:
        """Return what an earlier run of the same plan left, up to the first layer that isn't whole; None if nothing."""
        if not (folder / NOTES).is_file():
            return None
        try:
            stored = _Notes.model_validate(read_json(folder / NOTES))
        except (CheckpointError, ValidationError):  # damaged: its layers are made again
            return None
        if stored.plan != plan:
            return None
        whole = 0
        for layer, digest in enumerate(stored.files[: len(stored.notes)]):
            path = folder / _file_of(layer)
            if not path.is_file() or checksum_file(path) != digest:
                break
            whole += 1
        if not whole:
            return None
        return cls(folder, plan, stored.text, stored.slots, stored.notes[:whole], stored.files[:whole])

    def begin(self) -> None:
        """Make the folder, and remove all but these layers from it: half a layer, and activations of a killed run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = {NOTES, *(_file_of(layer) for layer in range(len(self)))} if self.files else set()
        for path in self.folder.iterdir():
            if path.name not in ours:
                remove(path)

    def __len__(self) -> int:
        return len(self.files)

    def add(self, attention: CalibratedLayer, note: Mapping[str, Any], others: Mapping[str, Array] = NOTHING) -> None:
        """Store the next layer.

        - `attention`: its heads or its latent.
        - `note`: what is recorded of it.
        - `others`: what changed outside attention, by the tensors' names in the source.
        """
        path = self.folder / _file_of(len(self))
        with replaced_file(path) as file:
            np.savez(file, **_arrays(attention), **{_OTHER + name: others[name] for name in others})  # type: ignore[arg-type]
        self.notes.append(dict(note))
        self.files.append(checksum_file(path))
        stored = _Notes(plan=self.plan, text=self.text, slots=self.rope_pairs, notes=self.notes, files=self.files)
        write_atomic(self.folder / NOTES, dump_json(dict(stored)))

    def read(self, layer: int) -> LayerHeads:
        """Return one layer's heads."""
        with np.load(self.folder / _file_of(layer), allow_pickle=False) as stored:
            parts = {part: Heads(stored[part], stored.get(f"{part}_bias")) for part in "qkvo"}
        return LayerHeads(**parts)

    def read_latent(self, layer: int) -> LatentHeads:
        """Return one layer's latent."""
        with np.load(self.folder / _file_of(layer), allow_pickle=False) as stored:
            return LatentHeads(**{name: stored[name] for name in stored.files if not name.startswith(_OTHER)})

    def other(self, layer: int, name: str) -> Array | None:
        """Return tensor `name` of the source outside one layer's attention, float32, None where it did not change."""
        with np.load(self.folder / _file_of(layer), allow_pickle=False) as stored:
            return stored[_OTHER + name] if _OTHER + name in stored.files else None

    def made(self, layer: int) -> MadeLayer | None:
        """Return what was made of one layer, None if nothing was yet."""
        if layer >= len(self):
            return None
        with np.load(self.folder / _file_of(layer), allow_pickle=False) as stored:
            latent = "down" in stored.files
            others = {name.removeprefix(_OTHER): stored[name] for name in stored.files if name.startswith(_OTHER)}
        return MadeLayer(self.read_latent(layer) if latent else self.read(layer), others)

    @property
    def errors_by_text(self) -> list[float]:
        """Return the last layer's error on the held-out blocks of each text; empty with one text."""
        choice = self.notes[-1].get("choice") if self.notes else None
        return list(choice.get("error_by_text", ())) if choice else []

    def explained(self, layer: int) -> dict[str, ExplainedEnergy]:
        """Return the energy that calibrated, svd and mean explain in one layer."""
        return {name: ExplainedEnergy(**shares) for name, shares in self.notes[layer]["kept"].items()}


class _Notes(BaseModel):
    """What calibration.json holds; `slots` are the rotary pairs that text chose."""

    plan: str
    text: dict[str, Any]
    slots: tuple[int, ...]
    notes: list[dict[str, Any]]
    files: list[str]


def _file_of(layer: int) -> str:
    return f"layer-{layer}.npz"


def _arrays(heads: CalibratedLayer) -> dict[str, Array]:
    if isinstance(heads, LatentHeads):
        found = {name: array for name, array in vars(heads).items() if array is not None}
    else:
        found = {part: heads.part(part).weight for part in "qkvo"}
        found |= {f"{part}_bias": bias for part in "qkvo" if (bias := heads.part(part).bias) is not None}
    return {name: np.asarray(array, np.float32) for name, array in found.items()}
