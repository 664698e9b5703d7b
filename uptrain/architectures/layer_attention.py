"""Read every layer's attention from a config: its heads, their dims, the window and the rotated dims."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.rope_parameters import EVERY, SLIDING, layer_types, rotated_dims
from uptrain.architectures.schema import BLOCKS, Packing, Position, Sliding
from uptrain.architectures.validation import MOST, MOST_HEAD_DIM, MOST_HEADS, MOST_LAYERS, check_most
from uptrain.errors import CheckpointError

if TYPE_CHECKING:
    from uptrain.architectures.description import ModelDescription


def read_attention(model: ModelDescription) -> tuple[AttentionSpec, ...]:
    """Return every layer's attention, and after each its attention over an encoder's output where it has one.

    Raises:
        CheckpointError: sizes that are missing, not positive, or don't divide.
    """
    keys = model.family.keys
    heads, hidden = model.size(keys.num_attention_heads), model.size(keys.hidden_size)
    key_value_heads = _key_value_heads(model, heads)
    head_dim = _head_dim(model, heads, hidden)
    check_most(heads, MOST_HEADS, "attention heads", model.name)
    check_most(head_dim, MOST_HEAD_DIM, "dims per head", model.name)
    if model.family.projections.packing is Packing.BLOCKS and heads % BLOCKS:
        raise CheckpointError(
            f"{model.name} has {heads} attention heads, which don't fill the {BLOCKS} blocks it needs."
        )
    layers = model.size(keys.num_hidden_layers)
    check_most(layers, MOST_LAYERS, "layers", model.name)
    by_layer = _heads_by_layer(model, [heads] * layers)
    for count in by_layer:
        if count % key_value_heads:
            raise CheckpointError(
                f"{model.name}: {key_value_heads} key/value heads don't divide {count} attention heads."
            )
    windows = _windows(model, layers)
    if keys.latent:
        spec = _latent(model, AttentionSpec(heads, key_value_heads, head_dim))
        return tuple(replace(spec, sliding_window=window) for window in windows)
    rotated = _rotated_dims(model, windows, head_dim)
    kinds = (False, True) if model.family.cross else (False,)
    return tuple(
        AttentionSpec(count, key_value_heads, head_dim, sliding_window=window, rotary_ndims=dims, cross=cross)
        for count, window, dims in zip(by_layer, windows, rotated, strict=True)
        for cross in kinds
    )


def _key_value_heads(model: ModelDescription, heads: int) -> int:
    keys = model.family.keys
    count = 1 if model.flag(keys.multi_query) else heads
    if keys.grouped and not model.flag(keys.grouped):
        return count  # the class does not look at the number in the config
    if keys.num_key_value_heads and model.is_given(keys.num_key_value_heads):
        return model.size(keys.num_key_value_heads)
    return count


def _head_dim(model: ModelDescription, heads: int, hidden: int) -> int:
    key = model.family.keys.head_dim
    if key and model.is_given(key):
        return model.size(key)
    if hidden % heads:
        raise CheckpointError(f"{model.name}: {heads} attention heads don't divide the hidden size {hidden}.")
    return hidden // heads


def _heads_by_layer(model: ModelDescription, same: list[int]) -> list[int]:
    """Return every layer's attention heads; `same` are those of a config that lists none."""
    key = model.family.keys.attention_heads_by_layer
    listed = model.config.get(key) if key else None
    if listed is None:
        return same
    if not isinstance(listed, list) or len(listed) != len(same) or not all(type(n) is int and n > 0 for n in listed):
        raise CheckpointError(
            f"{model.name} has {key} {listed!r}, not a positive whole number for each of {len(same)} layers."
        )
    return listed


def _latent(model: ModelDescription, spec: AttentionSpec) -> AttentionSpec:
    sizes: dict[str, Any] = {}
    for key, least in (("kv_lora_rank", 1), ("qk_rope_head_dim", 0), ("qk_nope_head_dim", 0), ("v_head_dim", 1)):
        value = model.config.get(key)
        if type(value) is not int or not least <= value <= MOST:
            raise CheckpointError(f"{model.name} has {key} {value!r}, not a whole number from {least} on.")
        sizes[key] = value
    width = sizes["qk_rope_head_dim"] + sizes["qk_nope_head_dim"]
    if not width:
        raise CheckpointError(
            f"{model.name} has neither qk_rope_head_dim nor qk_nope_head_dim, so its keys have no dims."
        )
    return replace(spec, head_dim=width, **sizes)


def _windows(model: ModelDescription, layers: int) -> list[int | None]:
    # null says that there is none; silence leaves what the class assumes.
    window = model.config.get("sliding_window", model.family.defaults.get("sliding_window"))
    if type(window) is not int or window < 1:
        return [None] * layers
    return [window if slides else None for slides in _sliding_layers(model, layers)]


def _sliding_layers(model: ModelDescription, layers: int) -> list[bool]:
    """Return for each layer whether it attends only to the tokens in the window."""
    listed = model.config.get("layer_types")
    if isinstance(listed, list):
        if len(listed) != layers:
            raise CheckpointError(f"{model.name} lists {len(listed)} layer_types for {layers} layers.")
        return [kind == SLIDING for kind in listed]
    sliding = model.family.sliding
    if model.family.sliding_flag and not model.config.get("use_sliding_window"):
        return [False] * layers
    if sliding is Sliding.LAST:
        return [layer >= model.config.get("max_window_layers", 0) for layer in range(layers)]
    if sliding is Sliding.EVEN:
        end = model.config.get("max_window_layers", model.family.defaults.get("max_window_layers", layers))
        return [layer % 2 == 0 and layer < end for layer in range(layers)]
    if sliding is Sliding.UNROTATED:
        return [not rotated for rotated in _rotated_layers(model, layers)]
    if sliding is Sliding.PATTERN:
        every = model.config.get("sliding_window_pattern", model.family.sliding_window_pattern)
        if type(every) is not int or every < 1:
            raise CheckpointError(f"{model.name} has sliding_window_pattern {every!r}, not a positive whole number.")
        return [(layer + 1) % every != 0 for layer in range(layers)]
    return [sliding is Sliding.ALL] * layers


def _rotated_dims(model: ModelDescription, windows: list[int | None], head_dim: int) -> list[int | None]:
    """Return how many of a head's dims each layer rotates, None for all that the family's position says."""
    layers = len(windows)
    if model.position is Position.ALIBI:
        return [0] * layers
    counted = model.family.keys.rotary_ndims
    if counted:
        count = model.size(counted)
        if count > head_dim or count % 2:
            raise CheckpointError(f"{model.name} has {counted} {count}, no even number of a head's {head_dim} dims.")
        return [count] * layers
    if not model.family.position.rotates:
        return [None] * layers
    known = {
        kind: rotated_dims(model.family, parameters, head_dim, model.name)[0] for kind, parameters in model.rope.items()
    }
    dims = [known.get(kind, known.get(EVERY)) for kind in layer_types(model.config, windows)]
    if model.family.rotates_sliding_only:
        rotates = [window is not None for window in windows]
    else:
        rotates = _rotated_layers(model, layers)
    return [count if rotated else 0 for count, rotated in zip(dims, rotates, strict=True)]


def _rotated_layers(model: ModelDescription, layers: int) -> list[bool]:
    # The list says 1 where a layer does rotate, whatever its name.
    listed = model.config.get("no_rope_layers")
    if isinstance(listed, list):
        if len(listed) != layers:
            raise CheckpointError(f"{model.name} lists {len(listed)} no_rope_layers for {layers} layers.")
        return [bool(rotated) for rotated in listed]
    if "no_rope_layer_interval" not in model.family.defaults:
        return [True] * layers
    every = model.size("no_rope_layer_interval")
    return [(layer + 1) % every != 0 for layer in range(layers)]
