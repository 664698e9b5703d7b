"""The rotary inverse frequencies that a config asks for, without torch; arithmetic as in transformers' functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from uptrain.errors import CheckpointError, UsageError

_MAGNITUDES = ("mscale", "mscale_all_dim")


@dataclass(frozen=True)
class InverseFrequencies:
    """The rotation of a head's rope pairs.

    Attributes:
        values: (head_dim/2,), radians per token, the highest first.
        attention_factor: the factor of all cosines and sines.
    """

    values: tuple[float, ...]
    attention_factor: float = 1.0


def partly_rotated(parameters: Mapping[str, Any], rotary_ndims: int, spread: int, head_dim: int) -> dict[str, Any]:
    """Return rotary parameters with the share of rotated dims written out.

    - `parameters`: the rotary parameters, in the words of transformers 5.
    - `rotary_ndims`: how many dims of a head are rotated.
    - `spread`: the number of dims that the inverse frequencies are computed for.
    - `head_dim`: the dims per head.

    Raises:
        UsageError: `spread` is odd, which classes round differently.
    """
    if spread % 2:
        raise UsageError(
            f"Its keys rotate {spread} of {head_dim} dims, an odd number, which no other class rotates in the same way."
        )
    share = rotary_ndims / head_dim
    # Classes multiply and cut off the fraction, so the share must not be smaller than the number asks for.
    share = share if int(head_dim * share) == rotary_ndims else math.nextafter(share, 2)
    return {**parameters, "partial_rotary_factor": share}


def inverse_frequencies(
    parameters: Mapping[str, Any], config: Mapping[str, Any], dims: int, name: str
) -> InverseFrequencies:
    """Return the inverse frequencies over `dims` dims that the rotary parameters of a config stand for.

    - `parameters`: the rotary parameters, in the words of transformers 5.
    - `config`: the whole config; scaling reads lengths from it.
    - `dims`: the number of rotated dims.
    - `name`: what the user called the model; errors name it.

    Raises:
        UsageError: a rope type whose inverse frequencies change with the length of the text.
        CheckpointError: parameters that are missing or no numbers.
    """
    kind = parameters["rope_type"]
    if kind not in _TYPES:
        raise UsageError(
            f"{name} has rope_type {kind}, whose inverse frequencies change with the text's length: they fit no latent "
            "yet.",
            "Use --rope pre-rope, or --to gqa.",
        )
    try:
        theta = float(parameters["rope_theta"])
        if theta <= 0:
            raise ValueError(f"rope_theta is {theta}")
        base = [theta ** (-2 * pair / dims) for pair in range((dims + 1) // 2)]
        found = _TYPES[kind](base, parameters, config, dims)
        if not all(0 < value < math.inf for value in (*found.values, found.attention_factor)):
            raise ValueError("a frequency is not a positive number")
        return found
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{name} has {kind} rotary parameters that can't be computed: {reason}.") from None


_Parameters = Mapping[str, Any]


def _default(base: list[float], _parameters: _Parameters, _config: _Parameters, _dims: int) -> InverseFrequencies:
    return InverseFrequencies(tuple(base))


def _linear(base: list[float], parameters: _Parameters, _config: _Parameters, _dims: int) -> InverseFrequencies:
    return InverseFrequencies(tuple(value / float(parameters["factor"]) for value in base))


def _llama3(base: list[float], parameters: _Parameters, config: _Parameters, _dims: int) -> InverseFrequencies:
    """Source: Llama Team 2024, The Llama 3 Herd of Models, section 3.4.2; transformers' modeling_rope_utils."""
    factor, old = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    out = []
    for value in base:
        rotations = old * value / (2 * math.pi)
        smooth = min(1.0, max(0.0, (rotations - low) / (high - low)))
        out.append((1 - smooth) * value / factor + smooth * value)
    return InverseFrequencies(tuple(out))


def _yarn(base: list[float], parameters: _Parameters, config: _Parameters, dims: int) -> InverseFrequencies:
    """Source: Peng et al. 2023, YaRN, section 3; transformers' modeling_rope_utils."""
    old = float(parameters["original_max_position_embeddings"])
    given = parameters["factor"]
    factor = float(config["max_position_embeddings"]) / old if given is None else float(given)
    theta = float(parameters["rope_theta"])

    def pair_of(rotations: float) -> float:
        return dims * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(float(parameters.get("beta_fast") or 32)), pair_of(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    width = (last - first) or 0.001
    ramp = [min(1.0, max(0.0, (pair - first) / width)) for pair in range(len(base))]
    values = tuple(value / factor * part + value * (1 - part) for value, part in zip(base, ramp, strict=True))
    return InverseFrequencies(values, _yarn_factor(parameters, factor))


def _yarn_factor(parameters: _Parameters, factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if scale and scale_all:
        return _magnitude(factor, float(scale)) / _magnitude(factor, float(scale_all))
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


_TYPES: Mapping[str, Callable[[list[float], _Parameters, _Parameters, int], InverseFrequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def truncated(parameters: Mapping[str, Any], dims: int, head_dim: int, factor: float = 1.0) -> dict[str, Any]:
    """Return rotary parameters whose `dims`/2 inverse frequencies are the highest of `head_dim`/2, scaling included.

    θ^(−2p/D) = θ'^(−2p/Dr) for θ' = θ^(Dr/D). Linear and llama3 scale a frequency by its own size alone. Yarn scales it
    by its place, which stays the same, unless the ramp would end after the last dim.

    - `parameters`: the source's rotary parameters.
    - `dims`: Dr, the number of rotated dims in the result.
    - `head_dim`: D, the number of rotated dims in the source.
    - `factor`: the factor of all cosines and sines. It is written out where yarn's mscale_all_dim was, since latent
      classes also read that as a softmax scale.
    """
    found = {key: value for key, value in parameters.items() if key not in _MAGNITUDES}
    if found.keys() != parameters.keys():
        found["attention_factor"] = factor
    return {**found, "rope_theta": float(parameters["rope_theta"]) ** (dims / head_dim)}


def longrope_table(
    parameters: Mapping[str, Any], values: tuple[float, ...], factor: float, longest: int
) -> dict[str, Any]:
    """Return "longrope" parameters that give exactly the inverse frequencies `values`, for a text of any length.

    Source: Ding et al. 2024, LongRoPE, section 3.2 for a factor per pair.

    - `parameters`: the source's rotary parameters.
    - `values`: the inverse frequency of each rope pair, radians per token.
    - `factor`: the factor of all cosines and sines.
    - `longest`: the tokens of the longest text, max_position_embeddings.
    """
    theta, dims = float(parameters["rope_theta"]), 2 * len(values)
    factors = [theta ** (-2 * pair / dims) / value for pair, value in enumerate(values)]
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "long_factor": factors,
        "short_factor": factors,
        "factor": 1.0,
        "attention_factor": factor,
        "original_max_position_embeddings": longest,
    }
