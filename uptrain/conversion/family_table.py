"""What every model family can become, from the table of families and the tables of target classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.schema import Family, Position
from uptrain.conversion.possible_targets import target_classes
from uptrain.methods.registry import METHODS, TARGETS
from uptrain.models.targets import TARGET_CLASSES


@dataclass(frozen=True)
class Holder:
    """A class that can hold a result.

    - `model_type`: its name.
    - `remote_code`: whether its modelling file goes into the checkpoint.
    - `needs`: the config flag that the source must have for it, empty where there is none.
    """

    model_type: str
    remote_code: bool
    needs: str = ""


@dataclass(frozen=True)
class FamilyRow:
    """One model family.

    - `model_type`: its name.
    - `packing`: how its projections are stored.
    - `position`: how its attention learns where a token stands.
    - `gqa`, `mqa`, `mla`: the classes that can hold each target, in the order in which they are tried.
    - `methods`: the methods that fit it.
    - `pool_only_with`: config keys which, whatever their value, leave only the methods that pool.
    - `normed_with`: config keys with which its keys are normed, so that only methods that can pool keys fit it.
    """

    model_type: str
    packing: str
    position: str
    gqa: tuple[Holder, ...]
    mqa: tuple[Holder, ...]
    mla: tuple[Holder, ...]
    methods: tuple[str, ...]
    pool_only_with: tuple[str, ...]
    normed_with: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the family as plain JSON values."""
        return asdict(self)


def families() -> tuple[FamilyRow, ...]:
    """Return every family that can be converted, by name, without classes that only hold results."""
    ours = {target.name for target in TARGET_CLASSES.values() if target.remote_code}
    found = (_family(entry) for name, entry in sorted(FAMILIES.items()) if name not in ours)
    return tuple(family for family in found if family.gqa or family.mqa)


def group_rows(found: Iterable[FamilyRow]) -> list[list[FamilyRow]]:
    """Group families that differ in nothing but their name, in the order of their first."""
    groups: dict[tuple[object, ...], list[FamilyRow]] = {}
    for family in found:
        rest = family.to_dict() | {"model_type": "", **{to: _other(family, to) for to in ("gqa", "mqa", "mla")}}
        groups.setdefault(tuple(map(repr, rest.values())), []).append(family)
    return list(groups.values())


def _other(family: FamilyRow, target: str) -> list[Holder | str]:
    """Return the holders of a target, a family's own class by that name."""
    holders: tuple[Holder, ...] = getattr(family, target)
    return ["itself" if holder.model_type == family.model_type else holder for holder in holders]


def _family(entry: Family) -> FamilyRow:
    normed = entry.key_norm is not None and not entry.key_norm.flag
    methods = [
        method.name
        for method in METHODS.values()
        if not (normed and method.pool_norm is None) and not (entry.uncalibrated and method.needs_text)
    ]
    flags = [entry.key_norm.flag] if entry.key_norm is not None and entry.key_norm.flag else []
    return FamilyRow(
        model_type=entry.model_type,
        packing=entry.projections.packing.value + (", transposed" if entry.projections.transposed else ""),
        position=_position(entry),
        gqa=_holders(entry, "gqa"),
        mqa=_holders(entry, "mqa"),
        mla=_holders(entry, "mla"),
        methods=tuple(methods),
        pool_only_with=tuple(key for key, pooled in entry.pool_only.items() if not pooled.unless),
        normed_with=tuple(flags),
    )


def _holders(entry: Family, kind: str) -> tuple[Holder, ...]:
    found = target_classes(entry, TARGETS[kind])
    return tuple(Holder(target.name, bool(target.remote_code), needs) for target, needs in found)


def _position(entry: Family) -> str:
    share = entry.partial_rotary_factor
    words = entry.position.value + (f" ({share:g} of each head)" if share != 1 else "")
    words += f" ({entry.defaults[entry.keys.rotary_ndims]} dims of each head)" if entry.keys.rotary_ndims else ""
    return f"{words}, or {Position.ALIBI.value}" if entry.keys.alibi else words
