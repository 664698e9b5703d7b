"""One attention layer with a latent: its maps, what they expand to, and how it attends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from uptrain.architectures.mla_projections import LatentParts
from uptrain.methods.head_maps import HeadMaps


@dataclass(frozen=True)
class LatentMaps(LatentParts[Tensor]):
    """One layer's latent attention as tensors. No method changes the output's bias, so it is not here."""

    def expanded(self) -> HeadMaps:
        """Return the heads that the latent expands to, where the shared rotary key is empty.

        Raises:
            ValueError: there is a shared rotary key.
        """
        if self.k_rope.shape[0]:
            raise ValueError("a layer with a shared rotary key isn't a layer of plain heads")
        k_bias = v_bias = None
        if self.down_bias is not None:
            k_bias, v_bias = self.k_up @ self.down_bias, self.v_up @ self.down_bias
        return HeadMaps(
            self.q_nope, self.k_up @ self.down, self.v_up @ self.down, self.o, self.q_nope_bias, k_bias, v_bias
        )


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of the shared rotary key's pairs, each (T, Dr/2), one row a position."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, inverse_frequencies: Tensor, positions: Tensor, factor: float = 1.0) -> Angles:
        """Return the angles of pairs with `inverse_frequencies` (Dr/2,), in radians per token, at `positions` (T,).

        `factor` multiplies cosines and sines, as scaled variants of RoPE ask for.
        """
        angles = positions.cpu().double()[:, None] * inverse_frequencies.cpu().double()
        return cls(factor * angles.cos(), factor * angles.sin())

    def rotate(self, pairs: Tensor) -> Tensor:
        """Rotate rows (…, T, Dr) of neighbouring pairs.

        Source: Su et al. 2021, RoFormer, equation 34.
        """
        cos, sin = self.cos.to(pairs), self.sin.to(pairs)
        real, imaginary = pairs[..., 0::2], pairs[..., 1::2]
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(-2)


def mix_heads(maps: LatentMaps, x: Tensor, angles: Angles, mask: Tensor | None, scale: float) -> Tensor:
    """Return the mixed heads (T, H·Dv), the output projection's input.

    - `maps`: the layer's latent attention.
    - `x`: (T, d), the attention's input.
    - `angles`: of the shared rotary key's pairs, at the T positions.
    - `mask`: broadcasts to (1, 1, T, T), boolean or added to the logits; None is causal.
    - `scale`: what logits are multiplied by.

    Source: DeepSeek-AI 2024, DeepSeek-V2, equations 9 to 19.
    """
    latent = _linear(x, maps.down, maps.down_bias)
    q_nope = _heads(x, maps.q_nope, maps.q_nope_bias)
    q_rope = angles.rotate(_heads(x, maps.q_rope, maps.q_rope_bias))
    k_rope = angles.rotate(_linear(x, maps.k_rope, maps.k_rope_bias))
    heads = len(q_nope)
    repeat = heads // len(maps.k_up)
    k_nope = torch.einsum("tr,hnr->htn", latent, maps.k_up).repeat_interleave(repeat, 0)
    value = torch.einsum("tr,hvr->htv", latent, maps.v_up).repeat_interleave(repeat, 0)
    query = torch.cat([q_nope, q_rope], dim=-1)
    key = torch.cat([k_nope, k_rope.expand(heads, -1, -1)], dim=-1)
    width = value.shape[-1]
    # One width for all three is what the fused kernels take; zeros change nothing.
    size = max(width, query.shape[-1])
    query, key, value = (functional.pad(part, (0, size - part.shape[-1]))[None] for part in (query, key, value))
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return mixed[0, ..., :width].transpose(0, 1).flatten(1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def _heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Project x (T, d) by (H, D, d) into (H, T, D)."""
    flat = functional.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    by_head: Tensor = flat.unflatten(-1, weight.shape[:2]).transpose(0, 1)
    return by_head
