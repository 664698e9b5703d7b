"""The rotary frequencies a config asks for, without torch; arithmetic as in transformers' own functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from uptrain.errors import CheckpointError, UsageError

_MAGNITUDES = ("mscale", "mscale_all_dim")


@dataclass(frozen=True)
class Frequencies:
    """Rotary `speeds` (head_dim/2,), radians a token, highest first, and what cosines and sines are multiplied by."""

    speeds: tuple[float, ...]
    factor: float = 1.0


def partly_rotated(parameters: Mapping[str, Any], rotary_ndims: int, spread: int, head_dim: int) -> dict[str, Any]:
    """Return rotary parameters with the share of rotated dims written out; their frequencies spread over `spread` dims.

    Raises:
        UsageError: an odd number of dims is rotated, which classes round differently.
    """
    if spread % 2:
        raise UsageError(f"Its keys rotate {spread} of {head_dim} dims, an odd number no other class agrees on.")
    share = rotary_ndims / head_dim
    # Classes multiply and cut off the fraction, which must not fall short of the number.
    share = share if int(head_dim * share) == rotary_ndims else math.nextafter(share, 2)
    return {**parameters, "partial_rotary_factor": share}


def source_frequencies(parameters: Mapping[str, Any], config: Mapping[str, Any], dims: int, where: str) -> Frequencies:
    """Return the frequencies over `dims` dims that a config class's rotary parameters stand for.

    `config` says what stands beside them.

    Raises:
        UsageError: a rope type whose frequencies change with the length of the text.
        CheckpointError: parameters that are missing or no numbers.
    """
    kind = parameters["rope_type"]
    if kind not in _VARIANTS:
        raise UsageError(
            f"{where} has rope_type {kind}, whose frequencies change with the text's length: they fit no latent yet.",
            "Use --rope pre-rope, or --to gqa.",
        )
    try:
        theta = float(parameters["rope_theta"])
        if theta <= 0:
            raise ValueError(f"rope_theta is {theta}")
        base = [theta ** (-2 * pair / dims) for pair in range((dims + 1) // 2)]
        found = _VARIANTS[kind](base, parameters, config, dims)
        if not all(0 < value < math.inf for value in (*found.speeds, found.factor)):
            raise ValueError("a frequency is not a positive number")
        return found
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{where} has {kind} rotary parameters that say no frequencies: {reason}.") from None


def _default(base: list[float], _parameters: Mapping[str, Any], _config: Mapping[str, Any], _dim: int) -> Frequencies:
    return Frequencies(tuple(base))


def _linear(base: list[float], parameters: Mapping[str, Any], _config: Mapping[str, Any], _dim: int) -> Frequencies:
    return Frequencies(tuple(speed / float(parameters["factor"]) for speed in base))


def _llama3(base: list[float], parameters: Mapping[str, Any], config: Mapping[str, Any], _dim: int) -> Frequencies:
    """Source: Llama Team 2024, The Llama 3 Herd of Models, section 3.4.2; transformers' modeling_rope_utils."""
    factor, old = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    out = []
    for speed in base:
        turns = old * speed / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        out.append((1 - smooth) * speed / factor + smooth * speed)
    return Frequencies(tuple(out))


def _yarn(base: list[float], parameters: Mapping[str, Any], config: Mapping[str, Any], dim: int) -> Frequencies:
    """Source: Peng et al. 2023, YaRN, section 3; transformers' modeling_rope_utils."""
    old = float(parameters["original_max_position_embeddings"])
    given = parameters["factor"]
    factor = float(config["max_position_embeddings"]) / old if given is None else float(given)
    theta = float(parameters["rope_theta"])

    def pair_of(turns: float) -> float:
        return dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(float(parameters.get("beta_fast") or 32)), pair_of(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = (last - first) or 0.001
    ramp = [min(1.0, max(0.0, (pair - first) / width)) for pair in range(len(base))]
    speeds = tuple(speed / factor * part + speed * (1 - part) for speed, part in zip(base, ramp, strict=True))
    return Frequencies(speeds, _yarn_factor(parameters, factor))


def _yarn_factor(parameters: Mapping[str, Any], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if scale and scale_all:
        return _magnitude(factor, float(scale)) / _magnitude(factor, float(scale_all))
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


_VARIANTS: Mapping[str, Callable[[list[float], Mapping[str, Any], Mapping[str, Any], int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def highest(parameters: Mapping[str, Any], dims: int, head_dim: int, factor: float = 1.0) -> dict[str, Any]:
    """Return rotary parameters whose `dims`/2 frequencies are the highest of `head_dim`/2, scaling included.

    θ^(−2p/D) = θ'^(−2p/Dr) for θ' = θ^(Dr/D). Linear and llama3 scale a frequency by its own size alone and yarn by
    its place, which stays, but for a ramp that would end after the last dim. `factor` is what the tables are
    multiplied by: latent classes read yarn's mscale_all_dim as a softmax scale besides, so it is said outright.
    """
    found = {key: value for key, value in parameters.items() if key not in _MAGNITUDES}
    if found.keys() != parameters.keys():
        found["attention_factor"] = factor
    return {**found, "rope_theta": float(parameters["rope_theta"]) ** (dims / head_dim)}


def own_table(parameters: Mapping[str, Any], speeds: tuple[float, ...], factor: float, longest: int) -> dict[str, Any]:
    """Return "longrope" parameters that give exactly `speeds`, whatever the text's length.

    Source: Ding et al. 2024, LongRoPE, section 3.2 for a factor per pair.
    """
    theta, dims = float(parameters["rope_theta"]), 2 * len(speeds)
    factors = [theta ** (-2 * pair / dims) / speed for pair, speed in enumerate(speeds)]
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "long_factor": factors,
        "short_factor": factors,
        "factor": 1.0,
        "attention_factor": factor,
        "original_max_position_embeddings": longest,
    }
