"""Read a model's family and attention from its config.json, without loading any class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.decoders import ARCHITECTURES, NO_CACHE
from uptrain.architectures.rope_parameters import EVERY, layer_types, rotary_parameters, rotated_dims
from uptrain.architectures.schema import BLOCKS, Architecture, KeyNorm, Packing, Position, Sliding
from uptrain.architectures.unknown_models import refuse_unknown
from uptrain.architectures.validation import DTYPE_KEYS as DTYPE_KEYS
from uptrain.architectures.validation import MOST, MOST_HEAD_DIM, MOST_HEADS, MOST_LAYERS, check_kinds, check_most
from uptrain.architectures.wrappers import WRAPPERS
from uptrain.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from uptrain.checkpoint.reader import Checkpoint


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """Return the table's entry for a config; `where` names the config in errors.

    Raises:
        UsageError: an encoder-only or unknown model type, or a variant that can't be converted.
        CheckpointError: a value of a wrong kind.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in NO_CACHE:
        raise UsageError(f"{where} is a {model_type}, an encoder-only model: it keeps no key/value cache to shrink.")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise refuse_unknown(config, where)
    check_kinds(config, where)
    architecture = ARCHITECTURES[model_type]
    for key, (value, why) in architecture.unsupported.items():
        if setting(config, key, architecture.defaults.get(key)) == value:
            raise UsageError(f"{where} has {key} {value}, which uptrain can't convert: {why}.")
    return architecture


def family_of(checkpoint: Checkpoint, where: str) -> Architecture:
    """Return the table's entry for a checkpoint's language model, with the names that it has inside a wrapper.

    Raises:
        UptrainError: as `architecture_of`, or a wrapper around a family that only another class could hold.
    """
    family = architecture_of(checkpoint.config, where)
    return family if checkpoint.tower is None else checkpoint.tower.architecture(family, where)


def auto_class_name(config: Mapping[str, Any]) -> str:
    """Name the Auto class of transformers that loads a config's language model; families need not be known."""
    model_type = str(config.get("model_type"))
    entry = ARCHITECTURES.get(model_type) or WRAPPERS.get(model_type)
    return Architecture.auto_class if entry is None else entry.auto_class


def setting(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return what a config says of `key`, which may lead into a section of it ("attn_config.clip_qkv")."""
    section, _, last = key.rpartition(".")
    inside = config.get(section) if section else config
    return inside.get(last, default) if isinstance(inside, Mapping) else default


def position_of_config(architecture: Architecture, config: Mapping[str, Any]) -> Position:
    """Return what tells a checkpoint's attention where a token stands."""
    return Position.ALIBI if _flag(architecture, config, architecture.keys.alibi) else architecture.position


def holds_groups(architecture: Architecture, config: Mapping[str, Any], num_key_value_heads: int) -> bool:
    """Tell whether a family's class, as the config sets it, can have this many key/value heads below all."""
    keys = architecture.keys
    return num_key_value_heads == 1 or not keys.grouped or _flag(architecture, config, keys.grouped)


def expands_cache(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Tell whether transformers' class caches a copy of keys and values for every query head."""
    return bool(architecture.expanded) and _flag(architecture, config, architecture.expanded)


def key_norm_of(architecture: Architecture, config: Mapping[str, Any]) -> KeyNorm | None:
    """Return the norm on a checkpoint's keys, None where there is none."""
    norm = architecture.key_norm
    if norm is None or not norm.flag or _flag(architecture, config, norm.flag):
        return norm
    return None


def why_pool_only(architecture: Architecture, config: Mapping[str, Any]) -> str:
    """Return why a checkpoint's heads can be pooled but not re-scaled, empty where they can."""
    if key_norm_of(architecture, config) is not None:
        return "its keys are normed after projection, which no longer cancels when heads are re-scaled"
    for key, why in architecture.pool_only.items():
        value = setting(config, key)
        if value is not None:
            return f"its {key} is {value}: {why}"
    return ""


def why_fixed_order(architecture: Architecture, config: Mapping[str, Any]) -> str:
    """Return why a checkpoint's heads can't take each other's places, empty where they can."""
    norm = key_norm_of(architecture, config)
    if norm is not None and norm.by_head:
        return "each head's keys are normed with weights of their own, which would have to move too"
    if position_of_config(architecture, config) is Position.ALIBI:
        return "ALiBi gives each head a slope by its place"
    return architecture.fixed_order


def config_value(architecture: Architecture, config: Mapping[str, Any], key: str, where: str) -> int:
    """Return the positive integer that config.json, or the family's default, gives for `key`.

    Raises:
        CheckpointError: it is neither given nor known, or no positive integer.
    """
    older = config.get(architecture.older.get(key, key))
    value = older if config.get(key) is None else config[key]
    value = architecture.defaults.get(key) if value is None else value
    if type(value) is not int or not 0 < value <= MOST:
        raise CheckpointError(f"{where} has {key} {value!r}, not a positive whole number.")
    return value


def initializer_std(architecture: Architecture, config: Mapping[str, Any]) -> float:
    """Return the deviation that a family's class draws fresh keys and values with."""
    keys = architecture.keys
    if keys.initializer_factor:
        factor = config.get(keys.initializer_factor, architecture.defaults.get(keys.initializer_factor))
        return float(factor) / math.sqrt(config_value(architecture, config, keys.hidden_size, "config.json"))
    return float(config.get(keys.initializer_range) or 0.02)


def attention_layers(architecture: Architecture, config: Mapping[str, Any], where: str) -> tuple[AttentionSpec, ...]:
    """Return every layer's attention, and after each its attention over an encoder's output where it has one.

    Raises:
        CheckpointError: sizes that are missing, not positive, or don't divide.
    """
    keys = architecture.keys

    def size(key: str) -> int:
        return config_value(architecture, config, key, where)

    heads, hidden = size(keys.num_attention_heads), size(keys.hidden_size)
    key_value_heads = heads
    if keys.multi_query and _flag(architecture, config, keys.multi_query):
        key_value_heads = 1
    if keys.grouped and not _flag(architecture, config, keys.grouped):
        pass  # the count is kept in the config, but not looked at
    elif keys.num_key_value_heads and _given(architecture, config, keys.num_key_value_heads):
        key_value_heads = size(keys.num_key_value_heads)
    if keys.head_dim and _given(architecture, config, keys.head_dim):
        head_dim = size(keys.head_dim)
    elif hidden % heads:
        raise CheckpointError(f"{where}: {heads} attention heads don't divide the hidden size {hidden}.")
    else:
        head_dim = hidden // heads
    check_most(heads, MOST_HEADS, "attention heads", where)
    check_most(head_dim, MOST_HEAD_DIM, "dims a head", where)
    if architecture.projections.packing is Packing.BLOCKS and heads % BLOCKS:
        raise CheckpointError(f"{where} has {heads} attention heads, which don't fill the {BLOCKS} blocks it needs.")
    layers = size(keys.num_hidden_layers)
    check_most(layers, MOST_LAYERS, "layers", where)
    by_layer = _heads_by_layer(architecture, config, [heads] * layers, where)
    for count in by_layer:
        if count % key_value_heads:
            raise CheckpointError(f"{where}: {key_value_heads} key/value heads don't divide {count} attention heads.")
    windows = _windows(architecture, config, layers, where)
    if keys.latent:
        spec = _latent(AttentionSpec(heads, key_value_heads, head_dim), config, where)
        return tuple(replace(spec, sliding_window=window) for window in windows)
    rotated = _rotated_dims(architecture, config, windows, head_dim, where)
    kinds = (False, True) if architecture.cross else (False,)
    return tuple(
        AttentionSpec(count, key_value_heads, head_dim, sliding_window=window, rotary_ndims=dims, cross=cross)
        for count, window, dims in zip(by_layer, windows, rotated, strict=True)
        for cross in kinds
    )


def _heads_by_layer(architecture: Architecture, config: Mapping[str, Any], same: list[int], where: str) -> list[int]:
    """Return every layer's attention heads; `same` are those of a config that lists none."""
    key = architecture.keys.attention_heads_by_layer
    listed = config.get(key) if key else None
    if listed is None:
        return same
    if not isinstance(listed, list) or len(listed) != len(same) or not all(type(n) is int and n > 0 for n in listed):
        raise CheckpointError(
            f"{where} has {key} {listed!r}, not a positive whole number for each of {len(same)} layers."
        )
    return listed


def _latent(spec: AttentionSpec, config: Mapping[str, Any], where: str) -> AttentionSpec:
    sizes: dict[str, Any] = {}
    for key, least in (("kv_lora_rank", 1), ("qk_rope_head_dim", 0), ("qk_nope_head_dim", 0), ("v_head_dim", 1)):
        value = config.get(key)
        if type(value) is not int or not least <= value <= MOST:
            raise CheckpointError(f"{where} has {key} {value!r}, not a whole number from {least} on.")
        sizes[key] = value
    width = sizes["qk_rope_head_dim"] + sizes["qk_nope_head_dim"]
    if not width:
        raise CheckpointError(f"{where} has neither qk_rope_head_dim nor qk_nope_head_dim, so its keys have no dims.")
    return replace(spec, head_dim=width, **sizes)


def _given(architecture: Architecture, config: Mapping[str, Any], key: str) -> bool:
    return config.get(key) is not None or key in architecture.defaults


def _flag(architecture: Architecture, config: Mapping[str, Any], key: str | None) -> bool:
    return key is not None and bool(config.get(key, architecture.defaults.get(key)))


def _windows(architecture: Architecture, config: Mapping[str, Any], layers: int, where: str) -> list[int | None]:
    # null says that there is none; silence leaves what the class assumes.
    window = config.get("sliding_window", architecture.defaults.get("sliding_window"))
    if type(window) is not int or window < 1:
        return [None] * layers
    types = config.get("layer_types")
    if isinstance(types, list):
        if len(types) != layers:
            raise CheckpointError(f"{where} lists {len(types)} layer_types for {layers} layers.")
        slides = [kind == "sliding_attention" for kind in types]
    elif architecture.sliding_flag and not config.get("use_sliding_window"):
        slides = [False] * layers
    elif architecture.sliding is Sliding.LAST:
        slides = [layer >= config.get("max_window_layers", 0) for layer in range(layers)]
    elif architecture.sliding is Sliding.EVEN:
        end = config.get("max_window_layers", architecture.defaults.get("max_window_layers", layers))
        slides = [layer % 2 == 0 and layer < end for layer in range(layers)]
    elif architecture.sliding is Sliding.UNROTATED:
        slides = [not rotated for rotated in _rotated_layers(architecture, config, layers, where)]
    elif architecture.sliding is Sliding.PATTERN:
        every = config.get("sliding_window_pattern", architecture.sliding_window_pattern)
        if type(every) is not int or every < 1:
            raise CheckpointError(f"{where} has sliding_window_pattern {every!r}, not a positive whole number.")
        slides = [(layer + 1) % every != 0 for layer in range(layers)]
    else:
        slides = [architecture.sliding is Sliding.ALL] * layers
    return [window if slide else None for slide in slides]


def _rotated_dims(
    architecture: Architecture, config: Mapping[str, Any], windows: list[int | None], head_dim: int, where: str
) -> list[int | None]:
    """Return how many of a head's dims each layer rotates, None for all that the family's position says."""
    layers = len(windows)
    if position_of_config(architecture, config) is Position.ALIBI:
        return [0] * layers
    counted = architecture.keys.rotary_ndims
    if counted:
        count = config_value(architecture, config, counted, where)
        if count > head_dim or count % 2:
            raise CheckpointError(f"{where} has {counted} {count}, no even number of a head's {head_dim} dims.")
        return [count] * layers
    if not architecture.position.rotates:
        return [None] * layers
    said = rotary_parameters(architecture, config, where)
    known = {kind: rotated_dims(architecture, parameters, head_dim, where)[0] for kind, parameters in said.items()}
    dims = [known.get(kind, known.get(EVERY)) for kind in layer_types(config, windows)]
    if architecture.rotates_sliding_only:
        rotates = [window is not None for window in windows]
    else:
        rotates = _rotated_layers(architecture, config, layers, where)
    return [count if rotated else 0 for count, rotated in zip(dims, rotates, strict=True)]


def _rotated_layers(architecture: Architecture, config: Mapping[str, Any], layers: int, where: str) -> list[bool]:
    # The list says 1 where a layer does rotate, whatever its name.
    listed = config.get("no_rope_layers")
    if isinstance(listed, list):
        if len(listed) != layers:
            raise CheckpointError(f"{where} lists {len(listed)} no_rope_layers for {layers} layers.")
        return [bool(rotated) for rotated in listed]
    if "no_rope_layer_interval" not in architecture.defaults:
        return [True] * layers
    every = config_value(architecture, config, "no_rope_layer_interval", where)
    return [(layer + 1) % every != 0 for layer in range(layers)]


def set_attention(architecture: Architecture, config: dict[str, Any], num_key_value_heads: int) -> None:
    """Write the number of key/value heads into a config of `architecture`, in the family's own word."""
    keys = architecture.keys
    if keys.num_key_value_heads:
        config[keys.num_key_value_heads] = num_key_value_heads
    if keys.multi_query:
        config[keys.multi_query] = num_key_value_heads == 1
