"""The type of a target class: a class that holds results, and how a source's checkpoint becomes one. Types only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from uptrain.architectures.rope_parameters import OLDER_TYPES
from uptrain.architectures.schema import Family

_NOTHING: Mapping[str, Any] = MappingProxyType({})

REMOTE_CODE = Path(__file__).parent / "remote_code"
"""The folder of the modelling files that go into results."""

SHARED_CODE = "uptrain_shared.py"
"""The file in it that every modelling file imports."""


@dataclass(frozen=True)
class TargetClass:
    """A class that can hold a result, and how a checkpoint of the source family becomes one of its own.

    Of the config:

    - `requires`: source values under which the class is exact.
    - `config_names`: the source's keys, by their new names here.
    - `multiples`: fills a value, where the source has none, with a multiple of another.
    - `fill`: values where the source is silent, since the two families' defaults differ.
    - `fix`: values that always hold; `drop`: keys that are removed.
    - `rotary`: the rotation is written out; `older_ropes`: the rope types that this class in transformers 4 reads.

    Of tensors outside attention, by module inside a layer or the model:

    - `transposes`: the linears that change between (in, out) and (out, in).
    - `renames`: the names in this class.
    - `folds`: a linear to the norm before it, whose weight and bias move into it.
    - `attention_norm`: the norm that moves into queries, keys and values; a norm without effect stays behind for all.
    - `zeros`: tensors of zeros, one per row of the token embedding, that this class has and the source lacks.
    - `shifts`: what is added to a norm's weight, for classes that add one themselves.
    - `biased`: all of the attention's linears have biases.

    Of classes: `purposes` are the endings of those with another head than the language model's, under the source
    family's names of tensors. `remote_code` is the modelling file that goes into the checkpoint, with `auto_classes`,
    where no stock class serves.
    """

    family: Family
    requires: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    config_names: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    multiples: Mapping[str, tuple[str, int]] = field(default_factory=lambda: _NOTHING)
    fill: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    fix: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    drop: tuple[str, ...] = ()
    rotary: bool = False
    older_ropes: tuple[str, ...] = OLDER_TYPES
    transposes: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    attention_norm: str = ""
    folds: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    shifts: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    zeros: tuple[str, ...] = ()
    biased: bool = False
    purposes: tuple[str, ...] = ("Model",)
    remote_code: str = ""
    auto_classes: Mapping[str, str] = field(default_factory=lambda: _NOTHING)

    @property
    def name(self) -> str:
        """Return the target class's model_type."""
        return self.family.model_type

    @property
    def code_files(self) -> tuple[str, ...]:
        """Return the names of the files in `REMOTE_CODE` that go into a result; none where a stock class holds it."""
        return (self.remote_code, SHARED_CODE) if self.remote_code else ()
