"""What a method and a grouping are: what each changes, needs and serves, and the functions that convert a layer.

Nothing here imports numpy or torch. The registry names the methods that exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from uptrain.architectures.attention import AttentionSpec
    from uptrain.architectures.mla_projections import LatentHeads, MLASpec
    from uptrain.architectures.projections import LayerHeads
    from uptrain.architectures.schema import Position
    from uptrain.checkpoint.dtypes import Array

EVERY_PART = frozenset("qkvo")

Layer = TypeVar("Layer", covariant=True)


@dataclass(frozen=True)
class ExplainedEnergy:
    """The share of a layer's key energy and of its value energy that a conversion explains, each at most 1.

    A share is below 0 where the conversion adds more error than the layer has energy.
    """

    keys: float
    values: float


class CalibratedSource(Protocol):
    """Layers that a calibration made before the conversion writes them."""

    def read(self, layer: int) -> LayerHeads:
        """Return the shared heads of one layer."""

    def read_latent(self, layer: int) -> LatentHeads:
        """Return the latent of one layer."""

    def other(self, layer: int, name: str) -> Array | None:
        """Return tensor `name` of the source outside one layer's attention, None where it did not change."""

    def explained(self, layer: int) -> Mapping[str, ExplainedEnergy]:
        """Return the energy that each method explains in one layer, by the method's name."""


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """What a method may use besides a layer's weights.

    - `index`: the layer's number; a decoder that reads an encoder counts each of its attentions.
    - `position`: how attention learns where a token stands.
    - `spec`: the layer's attention in the source.
    - `normed_keys`: whether a norm follows the projection of the keys, so that queries can't absorb a factor of them.
    - `seed`: the request's seed.
    - `initializer_std`: returns the standard deviation that the family's class initializes weights with.
    - `calibrated`: the layers that a calibration made, None for a method that needs no text.
    """

    index: int
    position: Position
    spec: AttentionSpec
    normed_keys: bool = False
    seed: int = 0
    initializer_std: Callable[[], float] = lambda: 0.02
    calibrated: CalibratedSource | None = None

    @property
    def calibration(self) -> CalibratedSource:
        """Return the layers that a calibration made.

        Raises:
            ValueError: there was no calibration.
        """
        if self.calibrated is None:
            raise ValueError("a method that needs text converts only what a calibration made")
        return self.calibrated


@dataclass(frozen=True)
class Converted(Generic[Layer]):
    """A converted layer, and the energy that this method and others explain, by the method's name, where measured."""

    layer: Layer
    explained: Mapping[str, ExplainedEnergy] = field(default_factory=dict)


ConvertHeads = Callable[["LayerHeads", int, LayerContext], Converted["LayerHeads"]]
"""Takes a layer, its new number of key/value heads and the context. Returns the layer with that many."""

ConvertLatent = Callable[["LayerHeads", "MLASpec", LayerContext], Converted["LatentHeads"]]
"""Takes a layer, the latent's sizes and the context. Returns the latent."""

PoolNorm = Callable[[Any, int, int], Any]
"""Takes a key norm's weight, (heads · head_dim,) or (heads, head_dim), the heads and the groups. Returns the pooled."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to make a layer's new attention. An entry of `registry.METHODS`.

    - `name`: what `--method` calls it.
    - `summary`: one phrase for the help, the model card and the documentation.
    - `changes`: which of the projections q, k, v and o it changes when it shares heads.
    - `convert`: makes fewer key/value heads; None where the method does not share heads.
    - `convert_latent`: makes a latent; None where the method makes none.
    - `pool_norm`: pools a key norm's weight as the method pools heads; a method without one can't be used where
      keys are normed.
    - `pools`: each new head is made of the values of a few old heads alone.
    - `estimated`: the run measures in numpy, while it converts, what this method and `svd` explain.
    - `needs_torch`, `needs_text`: what must be there; a method that needs text runs the source's layers on it.
    - `groupings`: which values of `--grouping` it can be used with.
    - `options`: the fields of a `Request` that only this method (and others that list them) uses.
    """

    name: str
    summary: str
    changes: frozenset[str] = EVERY_PART
    convert: ConvertHeads | None = None
    convert_latent: ConvertLatent | None = None
    pool_norm: PoolNorm | None = None
    pools: bool = False
    estimated: bool = False
    needs_torch: bool = False
    needs_text: bool = False
    groupings: tuple[str, ...] = ("contiguous", "similar")
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.convert is not None and not self.mixes_dims and self.pool_norm is None:
            raise ValueError(f"method {self.name} leaves queries as they are, so it needs a pool_norm for normed keys")

    @property
    def mixes_dims(self) -> bool:
        """Whether queries absorb a change of the keys: only exact where nothing but a rotation stands between them."""
        return "q" in self.changes

    def serves(self, target: TargetKind) -> bool:
        """Return whether the method makes this kind of target."""
        return (self.convert_latent if target.latent else self.convert) is not None


Arrange = Callable[["LayerHeads", int, LayerContext], tuple["LayerHeads", "list[int] | None"]]
"""Takes a layer, the number of groups and the context. Returns the layer, and its order where heads moved.

The order lists, for each key/value head of the result, its number in the given layer.
"""


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Which key/value heads come to share one. An entry of `registry.GROUPINGS`.

    - `name`: what `--grouping` calls it.
    - `summary`: one phrase for the help and the documentation.
    - `arrange`: puts the heads of each group next to each other; None where they stand so.
    - `needs_torch`: as of a `Method`.
    - `seeded`: it draws random numbers, so that `--seed` has an effect.
    """

    name: str
    summary: str
    arrange: Arrange | None = None
    needs_torch: bool = False
    seeded: bool = False

    @property
    def moves(self) -> bool:
        """Whether heads move, which takes their queries and output columns along."""
        return self.arrange is not None


@dataclass(frozen=True, kw_only=True)
class TargetKind:
    """What a layer's attention can become. An entry of `registry.TARGETS`.

    - `name`: what `--to` calls it.
    - `latent`: keys and values become one latent, instead of fewer heads.
    - `groups`: the number of key/value heads, None where the request says it or there are none.
    """

    name: str
    latent: bool = False
    groups: int | None = None

    @property
    def takes_groups(self) -> bool:
        """Whether `--groups` says how many key/value heads stay."""
        return not self.latent and self.groups is None
