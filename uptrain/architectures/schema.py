"""The fields of an entry in the table of families: where a family's attention is and how it works. Types only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

from uptrain.architectures.own_classes import OwnClass

BLOCKS = 4
"""The blocks of a projection that is packed in blocks, one for each core CodeGen was trained on."""


class Packing(Enum):
    """How the query, key and value rows of a layer are stored."""

    SEPARATE = "separate"
    """Three projections."""
    CONCAT = "concat"
    """One projection: all queries, then all keys, then all values."""
    GROUPED = "grouped"
    """One projection; per key/value head its query heads, its key, its value."""
    BLOCKS = "four blocks"
    """One projection in four blocks: the queries, then the values, then the keys of a quarter of the heads."""


class Position(Enum):
    """How attention encodes the position of a token."""

    ABSOLUTE = "absolute positions"
    ROTARY = "rotary"
    ROTARY_INTERLEAVED = "rotary, interleaved"
    ALIBI = "ALiBi"
    RELATIVE = "relative bias"

    @property
    def rotates(self) -> bool:
        """Tell whether keys are rotated."""
        return self in (Position.ROTARY, Position.ROTARY_INTERLEAVED)


class Sliding(Enum):
    """Which layers have the sliding window, where the config lists no `layer_types`."""

    NEVER = "never"
    ALL = "all"
    LAST = "last"
    """The layers from `max_window_layers` on."""
    EVEN = "even"
    """Every other layer, the first included, before `max_window_layers`."""
    UNROTATED = "unrotated"
    """The layers without rotation."""
    PATTERN = "pattern"
    """All but each `sliding_window_pattern`-th."""


@dataclass(frozen=True)
class Projections:
    """The attention's linear modules, relative to the layer's attention; `fused` replaces q, k and v.

    `transposed` marks weights stored (in, out), as GPT-2's Conv1D does, instead of nn.Linear's (out, in).
    """

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused: str = ""
    packing: Packing = Packing.SEPARATE
    transposed: bool = False


@dataclass(frozen=True)
class ConfigKeys:
    """Maps standard config names (hidden_size, …) to this family's names."""

    hidden_size: str = "hidden_size"
    num_hidden_layers: str = "num_hidden_layers"
    num_attention_heads: str = "num_attention_heads"
    num_key_value_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    multi_query: str | None = None
    """A flag that means one key/value head when it is true."""
    grouped: str | None = None
    """A flag: where it is off, the family has one key/value head or all of them. It overrides `multi_query`."""
    rotary_share: str = "partial_rotary_factor"
    """The share of a head's dims that is rotated, where the rotary parameters don't say it."""
    rotary_ndims: str | None = None
    """The number of rotated dims per head, in families that give a number instead of a share."""
    alibi: str | None = None
    """A flag that replaces the family's position with ALiBi."""
    latent: bool = False
    """Whether the config has the sizes of a latent (kv_lora_rank, …)."""
    vocab_size: str = "vocab_size"
    max_position_embeddings: str = "max_position_embeddings"
    initializer_range: str = "initializer_range"
    """The standard deviation of new random weights."""
    initializer_factor: str | None = None
    """In families whose deviation depends on the width: what multiplies 1/√hidden_size."""
    attention_heads_by_layer: str | None = None
    """A list with each layer's number of query heads, where they differ. It overrides `num_attention_heads`."""


@dataclass(frozen=True)
class KeyNorm:
    """A norm on the keys after their projection, relative to the layer's attention.

    Attributes:
        module: the norm's module; a "{head}" in it means one module per head.
        flag: the config key that turns the norm on, empty where it is always there.
        by_head: whether the weight has an entry per dim of each key head. Such a weight is pooled with the heads.
    """

    module: str = "k_norm"
    flag: str = ""
    by_head: bool = False

    @property
    def query_module(self) -> str:
        """Name the norm on the queries that belongs to the one on the keys."""
        return self.module.replace("key", "query") if "key" in self.module else "q" + self.module.removeprefix("k")


@dataclass(frozen=True)
class PoolOnly:
    """Why a config key, when set, lets heads be pooled alone, and the values with which it doesn't."""

    why: str
    unless: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """Where a family's token embedding and head are, and when the two are one matrix.

    Attributes:
        table: the embedding's name below the prefix.
        heads: the names of the head, newest first.
        tied: the config class's default for `tie_word_embeddings`.
        always: whether the class ties the two whatever config.json says.
        more: whether the flag decides about other tensors or scales too, so that no result may change it.
    """

    table: str = "embed_tokens.weight"
    heads: tuple[str, ...] = ("lm_head.weight",)
    tied: bool = False
    always: bool = False
    more: bool = False


_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class RopeSettings:
    """How a family's config class reads the rotary parameters of config.json, where families differ.

    Attributes:
        theta: the base where the config gives none.
        theta_key: the config key of the base, outside the section of rotary parameters.
        partly: whether the module rotates the given share of each head's dims; others rotate all dims.
        by_layer_type: in families with parameters per type of layer, each type's config key for its base, and its base
            where the config gives none.
        whole: the parameters of a config without `rope_parameters`.
        renamed: rope types that the class reads as other rope types.
    """

    theta: float = 10_000.0
    theta_key: str = "rope_theta"
    partly: bool = False
    by_layer_type: Mapping[str, tuple[str, float | None]] = field(default_factory=lambda: _NOTHING)
    whole: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    renamed: Mapping[str, str] = field(default_factory=lambda: _NOTHING)


@dataclass(frozen=True)
class Family:
    """One model family: names, packing, config keys and the target classes of its results.

    `native` families hold any number of groups themselves; `targets` names, per kind of result, the entries of
    `uptrain.models.targets` to try in order.
    """

    model_type: str
    class_name: str
    layer: str = "{prefix}layers.{layer}.self_attn."
    cross: str = ""
    """The name of a layer's attention over an encoder's output, in decoders that read one."""
    auto_class: str = "AutoModelForCausalLM"
    """Which of transformers' Auto classes loads it."""
    prefixes: tuple[str, ...] = ("model.", "")
    projections: Projections = Projections()
    keys: ConfigKeys = ConfigKeys()
    position: Position = Position.ROTARY
    partial_rotary_factor: float = 1.0
    """The share of a head's dims that is rotated, where the config gives none."""
    rotary: RopeSettings = RopeSettings()
    rotates_sliding_only: bool = False
    """Whether the layers without a sliding window have no rotation."""
    key_norm: KeyNorm | None = None
    sliding: Sliding = Sliding.NEVER
    sliding_flag: bool = False
    """Whether layers have a sliding window only if the config sets `use_sliding_window`."""
    sliding_window_pattern: int = 2
    """The config class's default."""
    vocabulary: Vocabulary = Vocabulary()
    buffers: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    defaults: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    """The config class's defaults."""
    older: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    """Config keys, and their names in older checkpoints, which the config class still reads."""
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _NOTHING)
    unsupported: Mapping[str, tuple[Any, str]] = field(default_factory=lambda: _NOTHING)
    """Config keys (with a dot where they lead into a section), the value that can't be converted, and the reason."""
    pool_only: Mapping[str, PoolOnly] = field(default_factory=lambda: _NOTHING)
    """Config keys that, when set, exclude methods that change queries and output."""
    fixed_order: str = ""
    """Why heads can't be reordered, apart from norms and ALiBi; empty where they can."""
    head_indices: Mapping[str, bool] = field(default_factory=lambda: _NOTHING)
    """Keys of generation_config.json that list pairs of layer and query head; true where they mean cross-attention."""
    uncalibrated: str = ""
    """Why calibration can't run a layer alone; empty where it can."""
    native: bool = True
    expanded: str = ""
    """The config flag with which transformers' class caches a copy for every query head."""

    def for_model(self, model_type: str, class_name: str, **changes: Any) -> Family:
        """Return the same entry under another `model_type`, with the given fields changed."""
        return replace(self, model_type=model_type, class_name=class_name, **changes)

    def for_own_class(self, own: OwnClass, **changes: Any) -> Family:
        """Return the same entry for a class of ours, with the given fields changed."""
        return self.for_model(own.model_type, own.head_class, **changes)

    def with_groups(self, own: OwnClass) -> Family:
        """Return the entry of our own class for a family that counts no key/value heads, which counts them."""
        keys = replace(self.keys, num_key_value_heads="num_key_value_heads")
        return self.for_own_class(own, keys=keys, targets={}, native=True)

    @property
    def attentions(self) -> tuple[str, ...]:
        """Return the names of a layer's attentions: its own and, in decoders that read an encoder, that one."""
        return (self.layer, self.cross) if self.cross else (self.layer,)

    def attention(self, prefix: str, index: int) -> str:
        """Name the model's attention number `index`; all attentions of a layer count before those of the next."""
        layer, which = divmod(index, len(self.attentions))
        return self.attentions[which].format(prefix=prefix, layer=layer)

    def inside(self) -> tuple[str, str]:
        """Return the name of the list of layers ("layers"), and of the attention in a layer ("self_attn")."""
        path, _, attention = self.layer.removeprefix("{prefix}").partition(".{layer}.")
        return path, attention.removesuffix(".")

    def place(self, index: int) -> str:
        """Return where the model's attention number `index` is, for people: "3", or "3, cross"."""
        layer, which = divmod(index, len(self.attentions))
        return f"{layer}, cross" if which else str(layer)
