"""Plan what a tensor becomes that serves a source as embedding and head both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from uptrain.architectures.description import CheckpointDescription
from uptrain.checkpoint.header import TensorInfo
from uptrain.conversion.plan.operations import Operation, copy_or_cast, new_info
from uptrain.models.target import TargetClass


def shared_outputs(
    source: CheckpointDescription,
    target: TargetClass,
    untied: bool,
    passed: Callable[[str, TensorInfo], Operation],
) -> dict[str, list[Operation]]:
    """Map the one tensor that a source stores for embedding and head to what it becomes; empty where it stores two.

    The result stores the embedding, because not every program accepts a head in its place. A target class that ties
    nothing gets a copy as its head.

    - `source`: the checkpoint.
    - `target`: the result's class.
    - `untied`: whether that class needs a head of its own.
    - `passed`: returns what becomes of a tensor outside attention, by its name and header.
    """
    embeddings = source.embeddings
    stored, names = embeddings.table, target.family.vocabulary
    if not embeddings.tied or not stored or stored != embeddings.head or names.more:
        return {}
    info = source.tensors[stored]
    table = replace(passed(embeddings.own_table, info), sources=(stored,))
    if not untied:
        return {stored: [table]}
    head = new_info(names.heads[0], table.output.dtype, info.shape)
    return {stored: [copy_or_cast(head, info), table]}
