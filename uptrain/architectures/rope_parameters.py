"""The rotary parameters of a config.json: read as the family's own config class does, and written for both spellings.

transformers 5 has one section for them, `rope_parameters`. transformers 4 has a section `rope_scaling`, with the base
and the share of rotated dims outside it. Where a config has both sections, transformers 5 prefers `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uptrain.architectures.schema import Family
from uptrain.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"
EVERY = ""
"""Stands for all layers where they have the same parameters."""

WORDS = (
    "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct", "rotary_emb_base",
    "rope_local_base_freq", "original_max_position_embeddings",
)  # fmt: skip
"""The keys of config.json for the rotation."""

STATIC = ("default", "linear", "llama3", "yarn")
"""The rope types whose inverse frequencies don't change with the text's length."""

OLDER_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""The rope types that transformers 4 knows."""

TYPES = (*OLDER_TYPES, "proportional")
"""The rope types that transformers 5 knows."""

_LIMITED = ("llama3", "yarn", "longrope")
_LENGTH = "original_max_position_embeddings"
_SHARE = "partial_rotary_factor"


def rotary_parameters(family: Family, config: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Return a config's rotary parameters as the family's config class reads them, in the words of transformers 5.

    The keys are layer types, or EVERY alone where all layers have the same parameters. A share of rotated dims is
    included only where the family's module uses it. `name` is what the user called the model.

    Raises:
        CheckpointError: parameters that the class can't read.
    """
    if family.keys.rotary_ndims:
        return {EVERY: {"rope_type": "default", "rope_theta": family.rotary.theta}}
    words = family.rotary
    if words.by_layer_type:
        found = _by_layer_type(family, config, name)
    else:
        found = {EVERY: _flat(family, config, name)}
    for parameters in found.values():
        kind = parameters.pop("type", "default")
        kind = parameters.setdefault("rope_type", kind)
        kind = parameters["rope_type"] = words.renamed.get(kind, kind) if isinstance(kind, str) else kind
        if kind in _LIMITED:
            _set_length(parameters, family, config)
        if kind == "default" and not words.partly:
            parameters.pop(_SHARE, None)
    return found


def _flat(family: Family, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    words, new = family.rotary, config.get("rope_parameters")
    found = dict(config.get("rope_scaling") or (words.whole if new is None else new))
    if any(isinstance(found.get(kind), Mapping) for kind in (FULL, SLIDING)):
        raise CheckpointError(
            f"{name} has rotary parameters for each type of layer, which {family.class_name} doesn't read.",
            "Say them once, for all layers.",
        )
    found.setdefault("rope_theta", config.get(words.theta_key, words.theta))
    silent = family.partial_rotary_factor if words.partly else None
    share = config.get(family.keys.rotary_share, silent)
    if share is not None:
        found.setdefault(_SHARE, share)
    return found


def _by_layer_type(family: Family, config: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    words, old = family.rotary, config.get("rope_scaling")
    merges = any(theta is not None for _, theta in words.by_layer_type.values())
    new = config.get("rope_parameters")
    if not merges:
        # These classes have no keys of transformers 4, and read either section as the other.
        new = config.get("rope_scaling", words.whole if new is None else new)
    given = new or {}
    for kind in words.by_layer_type:
        if not isinstance(given.get(kind) or {}, Mapping):
            raise CheckpointError(f"{name} has rotary parameters of {kind} {given[kind]!r:.100}, not an object.")
    found = {kind: dict(given.get(kind) or {"rope_type": "default"}) for kind in words.by_layer_type}
    if merges and old is not None:
        if new is not None and not isinstance(given.get(FULL), Mapping):
            raise CheckpointError(
                f"{name} has rope_scaling, and rope_parameters without {FULL}, which {family.class_name} can't read.",
                "Leave one of them out.",
            )
        found[FULL].update(old)
    for kind, (key, theta) in words.by_layer_type.items():
        base = config.get(key, theta) if key else theta
        if base is not None:
            found[kind].setdefault("rope_theta", base)
        scaled = found[kind].get("rope_type", found[kind].get("type", "default")) != "default"
        if scaled and config.get(_SHARE) is not None:
            found[kind].setdefault(_SHARE, config[_SHARE])
    return found


def _set_length(parameters: dict[str, Any], family: Family, config: Mapping[str, Any]) -> None:
    """Add the length from which scaling starts; the classes prefer the one outside the section."""
    known = {**family.defaults, **config}
    longest = known.get(family.keys.max_position_embeddings)
    if _LENGTH in known and not family.rotary.by_layer_type:
        parameters[_LENGTH] = known[_LENGTH]
    else:
        parameters.setdefault(_LENGTH, longest)


def rotated_dims(family: Family, parameters: Mapping[str, Any], head_dim: int, name: str) -> tuple[int | None, int]:
    """Return the rotated dims per head (None for all), and the dims that inverse frequencies are computed for.

    The two differ where the share gives an odd number: dims are rotated in pairs, so the class rounds up.

    - `family`: the model's family.
    - `parameters`: the rotary parameters, as `rotary_parameters` gives them.
    - `head_dim`: the dims per head.
    - `name`: what the user called the model.

    Raises:
        CheckpointError: the share is not between 0 and 1, or the family's module can't compute with it.
    """
    share = parameters.get(_SHARE)
    share = 1 if share is None else share
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise CheckpointError(f"{name} has {_SHARE} {share!r}, not a share of each head's dims.")
    # This rope type rotates the other dims too, by an angle of 0.
    if share == 1 or parameters["rope_type"] == "proportional":
        return None, head_dim
    if not family.rotary.partly:
        raise CheckpointError(
            f"{name} has {_SHARE} {share} with rope_type {parameters['rope_type']}, but {family.class_name} "
            "rotates all of each head.",
            f"Leave {_SHARE} out.",
        )
    spread = int(head_dim * share)
    return spread + spread % 2, spread


def layer_types(config: Mapping[str, Any], windows: list[int | None]) -> list[str]:
    """Return each layer's type: as the config lists it, else from the layers' windows."""
    listed = config.get("layer_types")
    if isinstance(listed, list) and len(listed) == len(windows):
        return [str(kind) for kind in listed]
    return [SLIDING if window else FULL for window in windows]


def write_rotation(config: dict[str, Any], parameters: Mapping[str, Any], older: tuple[str, ...] = OLDER_TYPES) -> None:
    """Write rotary parameters into a config of one kind of layer, so that transformers 5 and 4 read the same.

    `older` are the rope types that the class in transformers 4 reads. For another rope type it gets a base of null, at
    which it stops. Without that it would use its default base silently.
    """
    for word in WORDS:
        config.pop(word, None)
    found = {key: value for key, value in parameters.items() if key != "type"}
    kind = found["rope_type"]
    longest = config.get("max_position_embeddings")
    if kind == "longrope" and found.get(_LENGTH) not in (None, longest):
        config[_LENGTH] = found[_LENGTH]  # transformers 4 looks for it here alone
    config["rope_parameters"] = found
    config["rope_theta"] = found.get("rope_theta") if kind in older else None
    if _SHARE in found:
        config[_SHARE] = found[_SHARE]
    scaling = {key: value for key, value in found.items() if key not in ("rope_theta", _SHARE)}
    if kind != "default" and kind in older:
        config["rope_scaling"] = scaling


def with_rotation(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the rotary parameters of another config."""
    found = {key: value for key, value in config.items() if key not in WORDS}
    return {**found, **{key: other[key] for key in WORDS if key in other}}
