"""The words the table of families is written in: where a family's attention lives and how it runs. Types only."""

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
    """One projection in four blocks, each the queries, then the values, then the keys of a quarter of the heads."""


class Position(Enum):
    """What tells attention where a token stands."""

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
    """Which layers look back only `sliding_window` tokens when the config doesn't list `layer_types`."""

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
    """What the family's config.json calls the field's words."""

    hidden_size: str = "hidden_size"
    num_hidden_layers: str = "num_hidden_layers"
    num_attention_heads: str = "num_attention_heads"
    num_key_value_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    multi_query: str | None = None
    """A flag that means one key/value head when it is true."""
    grouped: str | None = None
    """A flag without which the family has no groups, only one key/value head or all; it overrides `multi_query`."""
    rotary_share: str = "partial_rotary_factor"
    """The share of a head's dims that are rotated, where rotary parameters don't say it."""
    rotary_ndims: str | None = None
    """The number of a head's dims that are rotated, in families that count them."""
    alibi: str | None = None
    """A flag that means ALiBi in place of the family's position."""
    latent: bool = False
    """Whether the field's words for a latent (kv_lora_rank, …) say what is cached."""
    vocab_size: str = "vocab_size"
    max_position_embeddings: str = "max_position_embeddings"
    initializer_range: str = "initializer_range"
    """The deviation that fresh weights are drawn with."""
    initializer_factor: str | None = None
    """In families that draw by width, what 1/√hidden_size is multiplied by for that."""
    attention_heads_by_layer: str | None = None
    """A list of every layer's attention heads, where they differ; it overrides `num_attention_heads`."""


@dataclass(frozen=True)
class KeyNorm:
    """A norm on the keys after their projection, relative to the layer's attention.

    `flag` is the config key that turns it on, if it isn't always there. With `by_head` its weight has an entry for
    every dim of every key head, and so is pooled with the heads; a "{head}" in `module` gives each head its own.
    """

    module: str = "k_norm"
    flag: str = ""
    by_head: bool = False

    @property
    def query_module(self) -> str:
        """Name the norm on the queries, which stands beside the one on the keys."""
        return self.module.replace("key", "query") if "key" in self.module else "q" + self.module.removeprefix("k")


@dataclass(frozen=True)
class Vocabulary:
    """Where a family's token embedding and head are, and when the two are one matrix.

    `table` is the embedding's name below the prefix, and `heads` are the head's names, newest first. `tied` is what the
    config class assumes of `tie_word_embeddings`; classes with `always` tie whatever config.json says. With `more` the
    flag decides about other tensors or scales too, so no result changes it.
    """

    table: str = "embed_tokens.weight"
    heads: tuple[str, ...] = ("lm_head.weight",)
    tied: bool = False
    always: bool = False
    more: bool = False


_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class RopeSettings:
    """How a family's config class reads what config.json says of rotation, where families differ.

    `theta` is the base of a silent config, and `theta_key` its word beside the rotary parameters. With `partly` a
    module rotates the share of each head's dims that it is given; others rotate all. `by_layer_type` families have
    parameters for each type of layer, and here each one's word for its base and the base of a silent config. `whole`
    are the parameters of a config that has no `rope_parameters`, `renamed` what a class takes a rope_type for.
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
    """Where a layer's attention over an encoder's output is, in decoders that read one."""
    auto_class: str = "AutoModelForCausalLM"
    """Which of transformers' Auto classes loads it."""
    prefixes: tuple[str, ...] = ("model.", "")
    projections: Projections = Projections()
    keys: ConfigKeys = ConfigKeys()
    position: Position = Position.ROTARY
    partial_rotary_factor: float = 1.0
    """The share of a head's dims that are rotated, where the config is silent."""
    rotary: RopeSettings = RopeSettings()
    rotates_sliding_only: bool = False
    """Whether the layers that look back all the way see no rotation."""
    key_norm: KeyNorm | None = None
    sliding: Sliding = Sliding.NEVER
    sliding_flag: bool = False
    """Whether layers slide only if the config says `use_sliding_window`."""
    sliding_window_pattern: int = 2
    """What the config class assumes where the config is silent."""
    vocabulary: Vocabulary = Vocabulary()
    buffers: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    defaults: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    """What the config class assumes where config.json is silent."""
    older: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    """Config keys and what older checkpoints call them, which the config class still reads."""
    targets: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _NOTHING)
    unsupported: Mapping[str, tuple[Any, str]] = field(default_factory=lambda: _NOTHING)
    """Config keys, with a dot where they lead into a section, the value that can't be converted, and why."""
    pool_only: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    """Config keys that, when set, rule out methods that change queries and output, and why."""
    fixed_order: str = ""
    """Why no head can take another's place, beyond norms and ALiBi; empty where each can."""
    head_indices: Mapping[str, bool] = field(default_factory=lambda: _NOTHING)
    """Keys of generation_config.json that list pairs of layer and query head; true where cross-attention is meant."""
    uncalibrated: str = ""
    """Why no layer can be run alone, which calibration does; empty where it can."""
    native: bool = True
    expanded: str = ""
    """The config flag under which transformers' class caches a copy for every query head."""

    def for_model(self, model_type: str, class_name: str, **changes: Any) -> Family:
        """Return the same layout under another `model_type`, with the given fields changed."""
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
        """Return where each of a layer's attentions is: its own and, in decoders that read an encoder, that one."""
        return (self.layer, self.cross) if self.cross else (self.layer,)

    def attention(self, prefix: str, index: int) -> str:
        """Name the model's attention number `index`, counted over all of a layer's before the next layer's."""
        layer, which = divmod(index, len(self.attentions))
        return self.attentions[which].format(prefix=prefix, layer=layer)

    def inside(self) -> tuple[str, str]:
        """Return where the list of layers is below the prefix ("layers"), and the attention in one ("self_attn")."""
        path, _, attention = self.layer.removeprefix("{prefix}").partition(".{layer}.")
        return path, attention.removesuffix(".")

    def place(self, index: int) -> str:
        """Say for people where the model's attention number `index` is: "3", or "3, cross"."""
        layer, which = divmod(index, len(self.attentions))
        return f"{layer}, cross" if which else str(layer)
