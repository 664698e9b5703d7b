"""Find missing weights from tensor names and shapes alone, for installations that have no class to ask."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.model_class import is_language_model
from uptrain.checkpoint.header import TensorInfo
from uptrain.errors import CheckpointError
from uptrain.models.class_fit import in_layers, listed

_LAYER = re.compile(r"^(?P<stack>(?:[a-z_]+\.)*?(?:layers|layer|h|blocks|block))\.(?P<number>\d+)\.(?P<rest>.+)$")

_FIRST_ONLY = "relative_attention_bias"
"""What the first layer of a stack computes for all of them."""


def check_kin(source: CheckpointDescription) -> None:
    """Refuse a checkpoint that lacks a tensor: one that similar layers have, the embedding, the head or the final norm.

    Quantized tensors are not checked: another layer may have the same weight as codes, under other names.

    Raises:
        CheckpointError: a tensor is missing.
    """
    family, tensors, stacks, hidden = source.family, source.tensors, _stacks(source.tensors), source.hidden_size
    coded = source.quantization.tensors if source.quantization is not None else frozenset[str]()
    missing = [each for stack, layers in stacks.items() for each in _missing(stack, layers)]
    missing = [each for each in missing if not _has_any(coded, each.rpartition(".")[0])]
    outside = {key: info for key, info in tensors.items() if not in_layers([key], family) and not _LAYER.match(key)}
    norms = [key for key, info in outside.items() if info.shape == (hidden,)]
    normed = any(info.shape == (hidden,) and key.endswith("norm.weight") for key, info in tensors.items())
    if not missing and normed and not norms and not _without_final_norm(source.config):
        missing = ["a norm after the last layer"]
    if not coded & outside.keys():
        missing += _tables(source, outside)
    if missing:
        raise CheckpointError(
            f"{source.name} lacks {listed(missing)}, which its class would fill with random values.",
            "Download or save it again.",
        )


def _has_any(tensors: Collection[str], module: str) -> bool:
    return any(tensor.startswith((f"{module}.", f"{module}_")) for tensor in tensors)  # experts' codes have no module


def _stacks(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[int, set[str]]]:
    """Map each stack of layers to the weights and biases of each layer, by their names in it."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in tensors:
        match = _LAYER.match(name)
        if match and name.endswith((".weight", ".bias")):
            found[match["stack"]][int(match["number"])].add(match["rest"])
    return found


def _missing(stack: str, layers: Mapping[int, set[str]]) -> list[str]:
    """Name what a layer lacks of another one that has all its own tensors and at most a third more."""
    out = []
    for number, own in sorted(layers.items()):
        kin = [other for other in layers.values() if own < other and 3 * len(other - own) <= len(other)]
        lacking = set().union(*(other - own for other in kin))
        out += [f"{stack}.{number}.{rest}" for rest in sorted(lacking) if _FIRST_ONLY not in rest]
    return out


def _tables(source: CheckpointDescription, outside: Mapping[str, TensorInfo]) -> list[str]:
    """Say whether the table of tokens, or the head that isn't tied to it, is missing."""
    tokens = source.vocab_size
    tables = [key for key, info in outside.items() if len(info.shape) == 2 and info.shape[0] == tokens]
    if not tables:
        return [f"an embedding of {tokens:,} tokens (vocab_size)"]
    headed = is_language_model(source.config) and source.config.get("tie_word_embeddings") is False
    return ["a language-model head separate from its embedding"] if headed and len(tables) < 2 else []


def _without_final_norm(config: Mapping[str, Any]) -> bool:
    # OPT has settings that leave it out.
    return config.get("do_layer_norm_before") is False or bool(config.get("_remove_final_layer_norm"))
