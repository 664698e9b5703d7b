"""The values that a layer's attention caches per token, and their bytes. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["mha", "gqa", "mqa", "mla"]


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention: query heads, key/value heads or a latent, and what its cache holds.

    Attributes:
        num_attention_heads: the query heads.
        num_key_value_heads: the key/value heads; of a latent, the heads that it expands to.
        head_dim: dims per query and key head.
        v_head_dim: dims per value head, None for `head_dim`.
        kv_lora_rank: values of the latent per token. It makes the attention MLA: the cache holds the latent instead of
            heads.
        qk_rope_head_dim: dims of the rotary key that is cached with the latent and shared by all heads.
        qk_nope_head_dim: dims per head of the keys that the latent expands to.
        sliding_window: the most tokens that the cache holds, None for all.
        rotary_ndims: how many of a head's first dims are rotated, None for all where the family's position rotates.
        cross: whether it attends over an encoder's output; the cache then holds the encoder's tokens.
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
        """Return the cache bytes of one sequence of `context` tokens, at `itemsize` bytes per value."""
        held = context if self.sliding_window is None else min(context, self.sliding_window)
        return held * self.cache_values_per_token * itemsize

    def grouped(self, num_key_value_heads: int) -> AttentionSpec:
        """Return the same layer with `num_key_value_heads` key/value heads."""
        return replace(self, num_key_value_heads=num_key_value_heads)

    def latent(self, kv_lora_rank: int, qk_rope_head_dim: int, qk_nope_head_dim: int, heads: int) -> AttentionSpec:
        """Return the same layer with a latent.

        - `kv_lora_rank`: values of the latent per token.
        - `qk_rope_head_dim`: dims of the rotary key that all heads share.
        - `qk_nope_head_dim`: unrotated dims per key head.
        - `heads`: the key and value heads that the latent expands to.
        """
        return replace(
            self,
            num_key_value_heads=heads,
            v_head_dim=self.v_head_dim or self.head_dim,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            qk_nope_head_dim=qk_nope_head_dim,
        )


def cache_bytes_per_token(layers: Sequence[AttentionSpec], itemsize: int) -> int:
    """Return the bytes that one more token costs over all layers, while no sliding window is full.

    In a decoder that reads an encoder, these are the bytes of one token of the target and one of the source.
    """
    return sum(layer.cache_bytes(1, itemsize) for layer in layers)


def cross_bytes_per_token(layers: Sequence[AttentionSpec], itemsize: int) -> int:
    """Return the bytes that one more token of an encoder's text costs, 0 without an encoder."""
    return cache_bytes_per_token([layer for layer in layers if layer.cross], itemsize)


def cache_bytes(layers: Sequence[AttentionSpec], context: int, itemsize: int) -> int:
    """Return the cache bytes over all layers for `context` tokens, and for an encoder's text of that length if any."""
    return sum(layer.cache_bytes(context, itemsize) for layer in layers)
