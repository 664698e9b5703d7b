"""Check the kinds of config.json's values before any code computes with them: a checkpoint is untrusted input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from uptrain.architectures.schema import Family
from uptrain.errors import CheckpointError, UsageError

DTYPE_KEYS = ("dtype", "torch_dtype")
"""The keys of config.json for the dtype of weights: in transformers 5, and before."""

MOST = 2**31 - 1
"""The largest whole number that a config may hold."""
MOST_LAYERS = 10_000
MOST_HEADS = 65_536
MOST_HEAD_DIM = 65_536
"""More than any model has, and few enough to list."""


def _number(value: Any) -> bool:
    # Whole numbers can be too long for a float, and 1e999 is read as infinity.
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _object(value: Any) -> bool:
    return isinstance(value, dict)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


_Kind = tuple[str, Callable[[Any], bool]]
NUMBER: _Kind = ("a number", _number)
WHOLE: _Kind = ("a whole number", _whole)
OBJECT: _Kind = ("an object", _object)
TEXT: _Kind = ("text", _text)
FLAG: _Kind = ("true or false", _flag)

KINDS: Mapping[str, _Kind] = MappingProxyType({
    "rope_theta": NUMBER, "rotary_emb_base": NUMBER, "rms_norm_eps": NUMBER, "initializer_range": NUMBER,
    "max_window_layers": WHOLE, "max_position_embeddings": WHOLE,
    "rope_parameters": OBJECT, "rope_scaling": OBJECT, "attn_config": OBJECT,
    "tie_word_embeddings": FLAG, "quantization_config": OBJECT,
})  # fmt: skip
"""The kind of value of config.json's keys, where they aren't null."""

ROPE_KINDS: Mapping[str, _Kind] = MappingProxyType({
    **dict.fromkeys(("rope_type", "type"), TEXT),
    **dict.fromkeys(
        ("rope_theta", "factor", "attention_factor", "original_max_position_embeddings", "partial_rotary_factor",
         "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        NUMBER,
    ),
})  # fmt: skip
"""The kind of value in the section of rotary parameters, where it isn't null."""

NEVER_NULL = frozenset({"max_window_layers", "rms_norm_eps"})


def check_kinds(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config with a value of the wrong kind; `where` names the config.

    Raises:
        CheckpointError: there is such a value.
    """
    _check(config, KINDS, where)
    for section in ("rope_parameters", "rope_scaling"):
        _check(config.get(section) or {}, ROPE_KINDS, f"{where}'s {section}")


def _check(values: Mapping[str, Any], kinds: Mapping[str, _Kind], where: str) -> None:
    for key, (kind, fits) in kinds.items():
        if key in values and (values[key] is not None or key in NEVER_NULL) and not fits(values[key]):
            raise CheckpointError(f"{where} has {key} {str(values[key])[:100]}, not {kind}.")


def check_supported(family: Family, config: Mapping[str, Any], name: str) -> None:
    """Refuse a variant of `family` that can't be converted; `name` is what the user called the model.

    Raises:
        UsageError: the config has a value that the family's entry lists as unsupported.
    """
    for key, (value, why) in family.unsupported.items():
        if setting(config, key, family.defaults.get(key)) == value:
            raise UsageError(f"{name} has {key} {value}, which uptrain can't convert: {why}.")


def setting(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Return what a config says of `key`, which may lead into a section of it ("attn_config.clip_qkv")."""
    section, _, last = key.rpartition(".")
    inside = config.get(section) if section else config
    return inside.get(last, default) if isinstance(inside, Mapping) else default


def check_most(value: int, most: int, what: str, where: str) -> None:
    """Refuse a size that no model has, before a list of that length is made.

    - `value`: the size.
    - `most`: the largest size that is accepted.
    - `what`: what is counted.
    - `where`: what the user called the model.

    Raises:
        CheckpointError: `value` is more than `most`.
    """
    if value > most:
        raise CheckpointError(f"{where} has {value:,} {what}, more than the {most:,} that uptrain accepts.")
