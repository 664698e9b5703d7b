"""Find everything that names a model's heads by number: heads move only where all of it moves too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.projections import PARTS, modules_of
from uptrain.architectures.schema import Family
from uptrain.checkpoint.files import write_atomic
from uptrain.checkpoint.jsonfile import dump_json, read_json
from uptrain.errors import CheckpointError, UsageError

GENERATION = "generation_config.json"


def check_order(source: CheckpointDescription) -> None:
    """Refuse to move heads where something that names them by number would not move.

    The projections move, and the lists in generation_config.json that the family's `head_indices` name. Norms that all
    heads of a layer share stay.

    Raises:
        UsageError: a tensor or a setting that may have an entry for each head.
        CheckpointError: generation_config.json names a layer or a head that the model doesn't have.
    """
    family, name = source.family, source.name
    bases = [source.attention_name(index) for index in range(len(source.attention))]
    moved = {f"{base}{movable}" for base in bases for movable in _movable(source)}
    for tensor, info in source.tensors.items():
        inside = tensor.startswith(tuple(bases)) and tensor not in moved
        buffer = any(tensor.endswith(f".{one}") for one in family.buffers)
        if inside and not buffer and math.prod(info.shape) > 1:
            raise _stays(name, f"tensor {tensor} may have weights of its own for each head")
    settings = {"config.json": source.config, GENERATION: _generation(source.checkpoint.path)}
    for file, values in settings.items():
        known = [family.keys.attention_heads_by_layer, *(family.head_indices if file == GENERATION else ())]
        for key, value in values.items():
            if "head" in key.lower() and isinstance(value, (list, dict)) and value and key not in known:
                raise _stays(name, f"{file} has {key}, which may name heads by number")
    for key, index, head in _indices(family, settings[GENERATION], len(source.attention)):
        if not 0 <= head < source.attention[index].num_attention_heads:
            raise CheckpointError(f"{name}'s {GENERATION} names head {head} in {key}, which the model doesn't have.")


def move_indices(source: CheckpointDescription, orders: Mapping[int, Sequence[int]], folder: Path) -> None:
    """Write the new numbers of moved heads into the generation_config.json of the result in `folder`.

    `orders` gives, for each attention whose heads moved, the source's key/value heads in the result's order.
    """
    values = _generation(source.checkpoint.path)
    found = list(_indices(source.family, values, len(source.attention)))
    if not orders or not found:
        return
    moved: dict[str, list[list[int]]] = {}
    for key, index, head in found:
        spec = source.attention[index]
        shared = spec.num_attention_heads // spec.num_key_value_heads
        group, place = divmod(head, shared)
        new = list(orders[index]).index(group) * shared + place
        moved.setdefault(key, []).append([index // len(source.family.attentions), new])
    write_atomic(folder / GENERATION, dump_json({**values, **moved}))


def _movable(source: CheckpointDescription) -> frozenset[str]:
    """Return the names, below an attention, of tensors that move with its heads or have no entry per head."""
    modules = {*modules_of(source.family.projections, frozenset(PARTS))}
    norm = source.key_norm
    if norm is not None and not norm.by_head:
        modules |= {norm.module, norm.query_module}
    return frozenset(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))


def _generation(path: Path) -> dict[str, Any]:
    return read_json(path / GENERATION) if (path / GENERATION).is_file() else {}


def _indices(family: Family, values: Mapping[str, Any], count: int) -> Iterator[tuple[str, int, int]]:
    """Yield each pair of a layer and a query head: the key, the number of the attention, and the head.

    Raises:
        CheckpointError: a list holds something other than such pairs, or a layer that the model doesn't have.
    """
    kinds = len(family.attentions)
    for key, cross in family.head_indices.items():
        for pair in values.get(key) or []:
            if not isinstance(pair, list) or len(pair) != 2 or not all(type(number) is int for number in pair):
                raise CheckpointError(f"{GENERATION} has {pair!r} in {key}, not a layer and a head.")
            if not 0 <= pair[0] < count // kinds:
                raise CheckpointError(f"{GENERATION} names layer {pair[0]} in {key}, which the model doesn't have.")
            yield key, pair[0] * kinds + (1 if cross else 0), pair[1]


def _stays(name: str, why: str) -> UsageError:
    return UsageError(
        f"--grouping similar can't be used on {name}: {why}, which would have to move too.", "Leave --grouping out."
    )
