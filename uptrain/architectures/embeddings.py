"""Find which stored tensors hold a checkpoint's token embedding and its head, and whether the two are tied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.schema import Family
from uptrain.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from uptrain.architectures.description import CheckpointDescription

FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Embeddings:
    """The tensors of a checkpoint with the values of its model's token embedding and head.

    Attributes:
        table: the stored tensor with the embedding's values, empty where there is none.
        head: the stored tensor with the head's values, empty where there is none.
        tied: whether the loaded model has one matrix for both.
        own_table: the class's own name for its embedding, stored or not.
    """

    table: str
    head: str
    tied: bool
    own_table: str


def embeddings_of(source: CheckpointDescription) -> Embeddings:
    """Return where the embedding's and the head's values are, as transformers' loader decides it.

    A model whose config ties the two has one matrix if only one of them is stored, or if both are stored with equal
    values. If both are stored and differ, it has two. Any other model has two. Values are read only where both are
    stored. For a model on the Hub, whose values can't be read yet, the config decides.

    Source: transformers 5.23, `PreTrainedModel.tie_weights`.

    Raises:
        CheckpointError: no tensor has the family's names, or the two tensors can't be read.
    """
    names, tensors = source.family.vocabulary, source.tensors
    own_table = source.prefix + names.table
    table = own_table if own_table in tensors else ""
    head = next((name for name in names.heads if name in tensors), "")
    if not declares_tied(source.family, source.config):
        return Embeddings(table, head, False, own_table)
    if table and head:
        return Embeddings(table, head, _same_values(source.checkpoint, table, head), own_table)
    return Embeddings(table or head, head or table, True, own_table)


def stored_table(source: CheckpointDescription) -> tuple[str, str]:
    """Return the embedding's own name and that of the tensor that holds its values; no values are read."""
    own, names = source.prefix + source.family.vocabulary.table, source.family.vocabulary.heads
    if own in source.tensors or not declares_tied(source.family, source.config):
        return own, own
    return own, next((name for name in names if name in source.tensors), own)


def declares_tied(family: Family, config: Mapping[str, Any]) -> bool:
    """Tell whether the family's class takes this config to tie the head to the embedding."""
    names = family.vocabulary
    return names.always or bool(config.get(FLAG, names.tied))


def declare(
    config: dict[str, Any], embeddings: Embeddings, source: Family, target: Family, untied: bool = False
) -> None:
    """Write into a result's config whether its class must tie the head, unless the class reads that from it already.

    - `config`: the result's config, changed in place.
    - `embeddings`: the source's embedding and head.
    - `source`: the source's family.
    - `target`: the family of the result's class.
    - `untied`: whether the result has a head of its own in any case.
    """
    tied = embeddings.tied and not untied
    if source.vocabulary.more or target.vocabulary.more:
        return  # there the flag also decides about other tensors
    if declares_tied(target, config) != tied:
        config[FLAG] = tied


def declare_loaded(config: dict[str, Any], tied_names: Collection[str]) -> None:
    """Write into a loaded model's config, in place, whether its head is tied; `tied_names` are its tied tensors."""
    entry = FAMILIES.get(str(config.get("model_type")))
    if entry is None or entry.vocabulary.more:
        return
    tied = any(name in tied_names for name in entry.vocabulary.heads)
    if declares_tied(entry, config) != tied:
        config[FLAG] = tied


def _same_values(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Tell whether two tensors have the same shape, dtype and bytes; stop at the first difference."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return checkpoint.remote or checkpoint.equal(first, second)
