"""Describe a model once: its family, and what its config.json says of attention, without loading any class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.decoders import FAMILIES, NO_CACHE
from uptrain.architectures.embeddings import Embeddings, embeddings_of
from uptrain.architectures.layer_attention import read_attention
from uptrain.architectures.prefixes import find_prefix
from uptrain.architectures.quantization import Quantization, quantization_of
from uptrain.architectures.rope_parameters import rotary_parameters
from uptrain.architectures.schema import Family, KeyNorm, Position
from uptrain.architectures.unknown_models import refuse_unknown
from uptrain.architectures.validation import MOST, check_kinds, check_supported, setting
from uptrain.architectures.wrappers import WRAPPERS, Tower, tower_in
from uptrain.checkpoint.header import TensorInfo
from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import CheckpointError, UsageError


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a config.json says about a language model. `describe` makes it once; properties are computed on first use.

    Attributes:
        family: the entry of the language model's family, with the tensor names that it has inside a wrapper.
        config: the language model's own config; inside a wrapper that is a section of config.json.
        name: what the user called the model; errors name it.
        tower: the place of the language model in a wrapper's config, None where nothing wraps it.
    """

    family: Family
    config: dict[str, Any]
    name: str
    tower: Tower | None = None

    @property
    def wrapped_in(self) -> str:
        """Return the model type of the wrapper, empty where nothing wraps the language model."""
        return "" if self.tower is None else self.tower.wrapper.model_type

    def as_family(self, family: Family) -> ModelDescription:
        """Return the description that the class of another family gives for the same config."""
        return ModelDescription(family=family, config=self.config, name=self.name)

    def value(self, key: str) -> Any:
        """Return what the config says of `key`, or the family's default where it is silent.

        A `key` with a dot leads into a section: "attn_config.clip_qkv".
        """
        return setting(self.config, key, self.family.defaults.get(key))

    def is_given(self, key: str) -> bool:
        """Tell whether the config or the family's defaults have a value for `key`."""
        return self.config.get(key) is not None or key in self.family.defaults

    def flag(self, key: str | None) -> bool:
        """Tell whether the flag `key` is on; no key is a flag that is off."""
        return key is not None and bool(self.config.get(key, self.family.defaults.get(key)))

    def size(self, key: str) -> int:
        """Return the positive integer that the config, or the family's default, gives for `key`.

        Raises:
            CheckpointError: it is neither given nor known, or it is no positive integer.
        """
        older = self.config.get(self.family.older.get(key, key))
        value = older if self.config.get(key) is None else self.config[key]
        value = self.family.defaults.get(key) if value is None else value
        if type(value) is not int or not 0 < value <= MOST:
            raise CheckpointError(f"{self.name} has {key} {value!r}, not a positive whole number.")
        return value

    @cached_property
    def hidden_size(self) -> int:
        """Return the width of the hidden states between layers. Raises as `size`."""
        return self.size(self.family.keys.hidden_size)

    @cached_property
    def vocab_size(self) -> int:
        """Return the number of rows of the token embedding. Raises as `size`."""
        return self.size(self.family.keys.vocab_size)

    @cached_property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """Return every layer's attention, and after each its attention over an encoder's output where it has one.

        Raises:
            CheckpointError: sizes that are missing, not positive, or don't divide.
        """
        return read_attention(self)

    @cached_property
    def rope(self) -> Mapping[str, dict[str, Any]]:
        """Return the rotary parameters as the family's config class reads them, in the words of transformers 5.

        The keys are layer types, or EVERY alone where all layers have the same.

        Raises:
            CheckpointError: parameters that the class can't read.
        """
        return rotary_parameters(self.family, self.config, self.name)

    @cached_property
    def position(self) -> Position:
        """Return what tells attention where a token stands."""
        return Position.ALIBI if self.flag(self.family.keys.alibi) else self.family.position

    @cached_property
    def key_norm(self) -> KeyNorm | None:
        """Return the norm on the keys, None where there is none."""
        norm = self.family.key_norm
        return norm if norm is None or not norm.flag or self.flag(norm.flag) else None

    @cached_property
    def why_pool_only(self) -> str:
        """Return why neither keys nor values can be re-scaled, so that heads are pooled; empty where values can be."""
        for key, pooled in self.family.pool_only.items():
            value = setting(self.config, key)
            if value is not None and value not in pooled.unless:
                return f"its {key} is {value}: {pooled.why}"
        return ""

    @cached_property
    def why_keys_pool(self) -> str:
        """Return why keys can be pooled but not re-scaled, empty where they can be re-scaled."""
        if self.key_norm is not None:
            return "its keys are normed after projection, which no longer cancels when heads are re-scaled"
        return self.why_pool_only

    @cached_property
    def why_fixed_order(self) -> str:
        """Return why heads can't take each other's places, empty where they can."""
        if self.key_norm is not None and self.key_norm.by_head:
            return "each head's keys are normed with weights of their own, which would have to move too"
        if self.position is Position.ALIBI:
            return "ALiBi gives each head a slope by its place"
        return self.family.fixed_order

    @cached_property
    def expands_cache(self) -> bool:
        """Tell whether transformers' class caches a copy of keys and values for every query head."""
        return bool(self.family.expanded) and self.flag(self.family.expanded)

    @cached_property
    def initializer_std(self) -> float:
        """Return the standard deviation with which the family's class draws fresh keys and values."""
        keys = self.family.keys
        if keys.initializer_factor:
            return float(self.value(keys.initializer_factor)) / math.sqrt(self.hidden_size)
        return float(self.config.get(keys.initializer_range) or 0.02)

    def holds_groups(self, num_key_value_heads: int) -> bool:
        """Tell whether the family's class, as the config sets it, can have this many key/value heads below all."""
        keys = self.family.keys
        return num_key_value_heads == 1 or not keys.grouped or self.flag(keys.grouped)


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription(ModelDescription):
    """The description of an open checkpoint: its tensors are known too. Made by `describe_checkpoint`."""

    checkpoint: Checkpoint = field(repr=False)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return the stored tensors by name."""
        return self.checkpoint.tensors

    @cached_property
    def prefix(self) -> str:
        """Return which of the family's prefixes the names of the body's tensors have.

        Raises:
            CheckpointError: no tensor has the family's names.
        """
        return find_prefix(self.family, self.tensors, self.name)

    @cached_property
    def embeddings(self) -> Embeddings:
        """Return where the values of the token embedding and of the head are.

        Raises:
            CheckpointError: no tensor has the family's names, or the two tensors can't be read.
        """
        return embeddings_of(self)

    @cached_property
    def quantization(self) -> Quantization | None:
        """Return how the checkpoint is quantized, None where it isn't.

        Raises:
            CheckpointError: a quantize_config.json or the like that can't be read.
        """
        return quantization_of(self.checkpoint)

    @cached_property
    def attention_biases(self) -> tuple[bool, bool]:
        """Return whether q, k or v have biases in the first layer, and whether the output projection has one."""
        base, output = self.attention_name(0), f"{self.family.projections.o}.bias"
        modules = {tensor.removeprefix(base) for tensor in self.tensors if tensor.startswith(base)}
        return any(module.endswith(".bias") and module != output for module in modules), output in modules

    @cached_property
    def attention_dtype(self) -> str:
        """Return the dtype of the first attention tensor, as headers name it."""
        base = self.attention_name(0)
        return next(info.dtype for name, info in self.tensors.items() if name.startswith(base))

    def attention_name(self, index: int) -> str:
        """Return how the tensor names of the model's attention number `index` begin, as `Family.attention`."""
        return self.family.attention(self.prefix, index)

    def block_name(self, index: int) -> str:
        """Return how the tensor names of the layer around the model's attention number `index` begin."""
        return self.attention_name(index).removesuffix(".").rpartition(".")[0] + "."


def describe(config: dict[str, Any], name: str) -> ModelDescription:
    """Describe the language model in a config.json; `name` is what the user called the model.

    Raises:
        UsageError: an encoder-only or unknown model type, a variant that can't be converted, or a wrapper around a
            family that only another class could hold.
        CheckpointError: a value of a wrong kind.
    """
    tower = tower_in(config)
    own = config if tower is None else tower.config
    family = _checked_family(own, name)
    family = family if tower is None else tower.placed(family, name)
    return ModelDescription(family=family, config=own, name=name, tower=tower)


def describe_checkpoint(checkpoint: Checkpoint, name: str) -> CheckpointDescription:
    """Describe an open checkpoint; `name` is what the user called it. Raises as `describe`."""
    found = describe(checkpoint.config, name)
    return CheckpointDescription(
        family=found.family, config=found.config, name=name, tower=found.tower, checkpoint=checkpoint
    )


def _checked_family(config: Mapping[str, Any], name: str) -> Family:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in NO_CACHE:
        raise UsageError(f"{name} is a {model_type}, an encoder-only model: it keeps no key/value cache to shrink.")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise refuse_unknown(config, name)
    check_kinds(config, name)
    family = FAMILIES[model_type]
    check_supported(family, config, name)
    return family


def auto_class_name(config: Mapping[str, Any]) -> str:
    """Name the Auto class of transformers that loads a config's language model; families need not be known."""
    model_type = str(config.get("model_type"))
    entry = FAMILIES.get(model_type) or WRAPPERS.get(model_type)
    return Family.auto_class if entry is None else entry.auto_class


def write_groups(family: Family, config: dict[str, Any], num_key_value_heads: int) -> None:
    """Write the number of key/value heads into a config of `family`, under the keys that the family has for it."""
    if family.keys.num_key_value_heads:
        config[family.keys.num_key_value_heads] = num_key_value_heads
    if family.keys.multi_query:
        config[family.keys.multi_query] = num_key_value_heads == 1
