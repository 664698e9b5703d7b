"""What a conversion makes of the attention layers: one type that fewer heads and a latent both implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from uptrain.architectures.attention import AttentionSpec
from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.mla_projections import LatentHeads, MLASpec
from uptrain.architectures.model_class import is_language_model
from uptrain.architectures.projections import LayerHeads
from uptrain.architectures.rope import InverseFrequencies
from uptrain.checkpoint.dtypes import Array
from uptrain.conversion.request import Request
from uptrain.methods.method import EVERY_PART
from uptrain.models.target import TargetClass


class PartShape(NamedTuple):
    """A tensor of a changed attention layer: its name in the attention, its shape, and the source's linear it follows.

    The dtype is that of `origin`'s weight, in whose place the tensor is written.
    """

    name: str
    shape: tuple[int, ...]
    origin: str


class PlannedRotation(NamedTuple):
    """The inverse frequencies that a plan reads from the source's config, and those that it writes."""

    source: InverseFrequencies
    result: InverseFrequencies


class LayerWork(Protocol):
    """Converts the heads of one layer when the plan runs."""

    def share(self, heads: LayerHeads, groups: int, layer: int) -> LayerHeads:
        """Return the layer with `groups` key/value heads."""

    def fit(self, heads: LayerHeads, layer: int) -> LayerHeads:
        """Return the heads as the target class computes them."""

    def compress(self, heads: LayerHeads, spec: MLASpec, layer: int) -> LatentHeads:
        """Return the layer as a latent of `spec`."""


@dataclass(frozen=True, kw_only=True)
class AttentionPlan(ABC):
    """What becomes of all attention layers, and what follows from it for the rest of the model.

    - `source`: the checkpoint.
    - `target`: the class that holds the result.
    - `after`: the result's attention, layer by layer.
    - `own_head`: the target class ties no head to the embedding.
    """

    source: CheckpointDescription
    target: TargetClass
    after: tuple[AttentionSpec, ...]
    own_head: bool = False

    @property
    @abstractmethod
    def label(self) -> str:
        """Return the word for the attention in a folder's name, such as gqa4."""

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Return the sizes that this kind of attention alone has, by their names in config.json."""

    @property
    @abstractmethod
    def recorded(self) -> Mapping[str, Any]:
        """Return what the manifest records of this kind of attention alone."""

    @property
    @abstractmethod
    def changes_heads(self) -> bool:
        """Whether the number or the kind of the heads changes."""

    @property
    @abstractmethod
    def changes_storage(self) -> bool:
        """Whether the target class stores all projections otherwise than the source's class."""

    @property
    @abstractmethod
    def renames_modules(self) -> bool:
        """Whether the attention has other modules than the source's, whatever the target class calls them."""

    @property
    @abstractmethod
    def writes_rotation(self) -> bool:
        """Whether the result's rotary parameters are written, instead of left as they are."""

    @property
    def rotation(self) -> PlannedRotation | None:
        """Return the inverse frequencies that the plan counts on, None where it does not compute any."""
        return None

    @property
    def chooses_rope_pairs(self) -> bool:
        """Whether the rotary pairs of a latent are still to be chosen, by what unrotated pairs would cost."""
        return False

    def with_rope_pairs(self, choose: Callable[[MLASpec], tuple[int, ...]]) -> AttentionPlan:
        """Return the plan with the rotary pairs that `choose` finds for a latent, where they are still to be chosen."""
        return self

    @property
    def pools_norms(self) -> bool:
        """Whether a norm's weights of each key head are pooled with the heads."""
        return False

    @property
    def scales(self) -> Mapping[str, float]:
        """Return, by the end of a tensor's name outside attention, what the tensor is multiplied by."""
        return MappingProxyType({})

    @property
    def stores_head(self) -> bool:
        """Whether the result stores a head of its own; classes for other purposes have none."""
        return self.own_head and is_language_model(self.source.config)

    def changed_parts(self, request: Request) -> frozenset[str]:
        """Return which of q, k, v and o change: all where they are stored otherwise, else those of the method."""
        return EVERY_PART if self.changes_storage else request.changed_parts

    @abstractmethod
    def check_tensors(self) -> None:
        """Refuse tensors of the source that this attention would leave without sense.

        Raises:
            UsageError: there are such tensors.
        """

    @abstractmethod
    def write_config(self) -> dict[str, Any]:
        """Return the config of the language model in the result, its dtype and tied head not yet set.

        Raises:
            UsageError: the target class can't express the source's rotation or purpose.
        """

    @abstractmethod
    def parts(self, layer: int, changed: Iterable[str], present: Mapping[str, list[str]]) -> Iterator[PartShape]:
        """Yield every tensor of a changed layer.

        - `layer`: the layer's number.
        - `changed`: which of q, k, v and o change.
        - `present`: by the source's linear, which of "weight" and "bias" it has.
        """

    @abstractmethod
    def convert(self, heads: LayerHeads, layer: int, work: LayerWork) -> dict[str, Array]:
        """Return a converted layer's tensors by name ("c_attn.weight", …), not yet in the result's dtype.

        - `heads`: the source's heads.
        - `layer`: the layer's number.
        - `work`: converts heads by the request's method.
        """
