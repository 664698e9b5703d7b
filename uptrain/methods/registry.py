"""Every method, grouping and kind of target, each one entry. Adding a method is adding an entry here.

Importing this module is cheap: an entry imports numpy, torch and its mathematics when it converts its first layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from uptrain.methods.method import Converted, Grouping, LayerContext, Method, TargetKind

if TYPE_CHECKING:
    from uptrain.architectures.mla_projections import LatentHeads, MLASpec
    from uptrain.architectures.projections import LayerHeads
    from uptrain.checkpoint.dtypes import Array


def _mean(layer: LayerHeads, groups: int, context: LayerContext) -> Converted[LayerHeads]:
    from uptrain.methods.pooling import mean, pool_layer

    return Converted(pool_layer(layer, groups, mean))


def _mean_norm(weight: Array, heads: int, groups: int) -> Array:
    from uptrain.methods.pooling import mean, pool_norm

    return pool_norm(weight, heads, groups, mean)


def _first(layer: LayerHeads, groups: int, context: LayerContext) -> Converted[LayerHeads]:
    from uptrain.methods.pooling import first, pool_layer

    return Converted(pool_layer(layer, groups, first))


def _first_norm(weight: Array, heads: int, groups: int) -> Array:
    from uptrain.methods.pooling import first, pool_norm

    return pool_norm(weight, heads, groups, first)


def _random(layer: LayerHeads, groups: int, context: LayerContext) -> Converted[LayerHeads]:
    from uptrain.methods.pooling import random_layer

    return Converted(random_layer(layer, groups, context.index, context.seed, context.initializer_std()))


def _random_norm(weight: Array, heads: int, groups: int) -> Array:
    from uptrain.methods.pooling import ones, pool_norm

    return pool_norm(weight, heads, groups, ones)


def _svd(layer: LayerHeads, groups: int, context: LayerContext) -> Converted[LayerHeads]:
    from uptrain.methods.head_conversion import factor_layer, factor_values, rotary_of

    if context.normed_keys:
        return factor_values(layer, groups)
    return factor_layer(layer, groups, rotary_of(context.position, context.spec))


def _svd_latent(layer: LayerHeads, target: MLASpec, context: LayerContext) -> Converted[LatentHeads]:
    from uptrain.methods.head_conversion import rotary_of
    from uptrain.methods.mla_conversion import latent_layer

    return latent_layer(layer, target, rotary_of(context.position, context.spec))


def _calibrated(layer: LayerHeads, groups: int, context: LayerContext) -> Converted[LayerHeads]:
    made = context.calibration
    return Converted(made.read(context.index), made.explained(context.index))


def _calibrated_latent(layer: LayerHeads, target: MLASpec, context: LayerContext) -> Converted[LatentHeads]:
    made = context.calibration
    return Converted(made.read_latent(context.index), made.explained(context.index))


def _similar(layer: LayerHeads, groups: int, context: LayerContext) -> tuple[LayerHeads, list[int] | None]:
    from uptrain.methods.grouping import similar_layer
    from uptrain.methods.head_conversion import rotary_of

    return similar_layer(layer, groups, rotary_of(context.position, context.spec), context.seed)


def _by_name(entries: Iterable[Any]) -> dict[str, Any]:
    return {entry.name: entry for entry in entries}


METHODS: dict[str, Method] = _by_name((
    Method(
        name="mean", summary="the heads of a group averaged (Ainslie et al., 2023)",
        changes=frozenset("kv"), convert=_mean, pool_norm=_mean_norm, pools=True, estimated=True,
    ),
    Method(
        name="first", summary="the first head of each group",
        changes=frozenset("kv"), convert=_first, pool_norm=_first_norm, pools=True,
    ),
    Method(
        name="random", summary="fresh random heads",
        changes=frozenset("kv"), convert=_random, pool_norm=_random_norm, options=("seed",),
    ),
    Method(
        name="svd",
        summary="heads aligned and factored by weights alone, the rest moved into the query and output projections",
        convert=_svd, pool_norm=_mean_norm, convert_latent=_svd_latent, needs_torch=True,
    ),
    Method(
        name="calibrated", summary="heads factored by the activations of the model on a text, and repaired on it",
        convert=_calibrated, convert_latent=_calibrated_latent, needs_torch=True, needs_text=True,
        groupings=("contiguous",),
        options=("calibrate", "quality", "calibration_tokens", "calibration_block", "repair", "repair_steps", "seed"),
    ),
))  # fmt: skip
"""Every method by its name, in the order in which help, tables and pictures show them.

The first that serves a target is its default.
"""

GROUPINGS: dict[str, Grouping] = _by_name((
    Grouping(name="contiguous", summary="neighbours, as in the paper"),
    Grouping(
        name="similar", summary="least loss; heads are moved", arrange=_similar, needs_torch=True, seeded=True
    ),
))  # fmt: skip
"""Every grouping by its name. The first is the default."""

TARGETS: dict[str, TargetKind] = _by_name((
    TargetKind(name="gqa"), TargetKind(name="mqa", groups=1), TargetKind(name="mla", latent=True),
))  # fmt: skip
"""Every kind of target by its name."""


def default_method(target: TargetKind) -> str:
    """Return the name of the method that a target gets where none is asked for."""
    return next(method.name for method in METHODS.values() if method.serves(target))


def method_options() -> tuple[str, ...]:
    """Return the fields of a request that have an effect with some methods only, each once."""
    return tuple(dict.fromkeys(option for method in METHODS.values() for option in method.options))


def methods_with(option: str) -> list[str]:
    """Return the names of the methods that use a field of a request."""
    return [method.name for method in METHODS.values() if option in method.options]


def needs_text(name: str) -> bool:
    """Return whether the method of this name, which may be of another version of uptrain, needs text."""
    return name in METHODS and METHODS[name].needs_text


def text_options() -> tuple[str, ...]:
    """Return the fields of a request that only methods which need text use."""
    others = {option for method in METHODS.values() if not method.needs_text for option in method.options}
    return tuple(option for option in method_options() if option not in others)
