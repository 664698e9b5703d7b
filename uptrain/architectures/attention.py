"""How many values an attention layer keeps per token, and how many bytes that costs. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["mha", "gqa", "mqa", "mla"]


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention: query heads, key/value heads or a latent, and what its cache holds.

    `kv_lora_rank` makes it MLA: the cache then holds the latent and `qk_rope_head_dim` shared rotary key values
    instead of heads, and a query head has `qk_nope_head_dim` dims for what the latent expands to beside the rotary
    ones. `sliding_window` (tokens) bounds how many tokens the cache holds at all. `rotary_ndims` counts the first dims
    of a head that are rotated, None for all that the family's position says. A `cross` layer attends over an encoder's
    output, so its cache holds the source's tokens instead of the target's.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int | None = None
    sliding_window: int | None = None
    rotary_ndims: int | None = None
    cross: bool = False

    def __post_init__(self) -> None:
        if min(self.num_attention_heads, self.num_key_value_heads, self.head_dim) < 1:
            raise ValueError(f"heads and head_dim must be positive, not {self}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @property
    def kind(self) -> Kind:
        """Name the layer's attention: mha, gqa, mqa or mla."""
        if self.kv_lora_rank is not None:
            return "mla"
        if self.num_key_value_heads == self.num_attention_heads:
            return "mha"
        return "mqa" if self.num_key_value_heads == 1 else "gqa"

    @property
    def cache_values_per_token(self) -> int:
        """Count the values one token leaves in this layer's cache.

        Source: Ainslie et al. 2023, section 2 (GQA); DeepSeek-V2 (2024), section 2.1.4, table 1 (MLA).
        """
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.num_key_value_heads * (self.head_dim + (self.v_head_dim or self.head_dim))

    def cache_bytes(self, context: int, itemsize: int) -> int:
        """Return the cache bytes of one sequence of `context` tokens at `itemsize` bytes a value."""
        held = context if self.sliding_window is None else min(context, self.sliding_window)
        return held * self.cache_values_per_token * itemsize

    def grouped(self, num_key_value_heads: int) -> AttentionSpec:
        """Return the same layer with `num_key_value_heads` key/value heads."""
        return replace(self, num_key_value_heads=num_key_value_heads)

    def latent(self, kv_lora_rank: int, qk_rope_head_dim: int, qk_nope_head_dim: int, heads: int) -> AttentionSpec:
        """Return the same layer with a latent that expands to `heads` keys and values."""
        return replace(
            self,
            num_key_value_heads=heads,
            v_head_dim=self.v_head_dim or self.head_dim,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            qk_nope_head_dim=qk_nope_head_dim,
        )


def cache_bytes_per_token(layers: Sequence[AttentionSpec], itemsize: int) -> int:
    """Return the bytes one more token costs over all layers while no sliding window is full.

    Of a decoder that reads an encoder it is one token of the target and one of the source.
    """
    return sum(layer.cache_bytes(1, itemsize) for layer in layers)


def cross_bytes_per_token(layers: Sequence[AttentionSpec], itemsize: int) -> int:
    """Return the bytes one more token of the source costs, 0 without an encoder."""
    return cache_bytes_per_token([layer for layer in layers if layer.cross], itemsize)


def cache_bytes(layers: Sequence[AttentionSpec], context: int, itemsize: int) -> int:
    """Return the cache bytes over all layers of one sequence of `context` tokens, and of a source as long if any."""
    return sum(layer.cache_bytes(context, itemsize) for layer in layers)
