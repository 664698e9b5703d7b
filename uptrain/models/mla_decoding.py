"""Absorbed decoding for stock MLA classes, which expand all cached latents to full keys and values at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
    eager_attention_forward,
)

from uptrain.models.remote_code.uptrain_shared import AbsorbedDecoding, cache_argument

CACHE = cache_argument(DeepseekV3Attention)


class AbsorbedDeepseekV3Attention(AbsorbedDecoding, DeepseekV3Attention):
    """Attend over cached latents as they are, where that takes fewer products than expanding them.

    Source: DeepSeek-AI 2024, DeepSeek-V2, section 2.1.2: W_uk goes into the queries and W_uv into the output.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over hidden_states (batch, tokens, hidden_size) and the cache of latents and rotary keys."""
        layer: Any = self
        cache: Cache | None = kwargs.pop(CACHE, None)
        if cache is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)[:2]
        batch, tokens = hidden_states.shape[:2]
        if layer.q_lora_rank is None:
            query = layer.q_proj(hidden_states)
        else:
            query = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (-1, layer.qk_head_dim)).transpose(1, 2)
        query, query_rope = query.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
        latent, key_rope = layer.kv_a_proj_with_mqa(hidden_states).split(
            [layer.kv_lora_rank, layer.qk_rope_head_dim], dim=-1
        )
        latent, key_rope = layer.kv_a_layernorm(latent).unsqueeze(1), key_rope.unsqueeze(1)
        rotate = apply_rotary_pos_emb_interleave if layer.config.rope_interleave else apply_rotary_pos_emb
        query_rope, key_rope = rotate(query_rope, key_rope, *position_embeddings)
        latent, key_rope = cache.update(latent, key_rope, layer.layer_idx, kwargs=kwargs)

        absorbed = layer.absorbs(tokens, latent, attention_mask)
        if absorbed:
            query, key, attention_mask = layer.absorb_queries(query, latent, attention_mask, (query_rope, key_rope))
            value = key
            kwargs["is_causal"] = False  # the mask says it all; folded heads aren't later tokens
        else:
            query = torch.cat([query, query_rope], dim=-1)
            key, value = layer.expand_kv(latent, key_rope)
        attention_interface: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = (
            ALL_ATTENTION_FUNCTIONS.get_interface(layer.config._attn_implementation, eager_attention_forward)
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=layer.attention_dropout if layer.training else 0.0,
            scaling=layer.scaling,
            **kwargs,
        )
        if absorbed:
            output, weights = layer.expand_output(output, weights, tokens)
        return layer.o_proj(output.reshape(batch, tokens, -1).contiguous()), weights


def absorb(model: nn.Module) -> int:
    """Let a model's stock MLA layers decode absorbed, in place; return how many there are."""
    layers: list[Any] = [module for module in model.modules() if type(module) is DeepseekV3Attention]
    for layer in layers:
        layer.__class__ = AbsorbedDeepseekV3Attention
        layer.latent_sizes = [layer.kv_lora_rank, layer.qk_rope_head_dim]
        layer.kv_sizes = [layer.qk_nope_head_dim, layer.v_head_dim]
    return len(layers)
