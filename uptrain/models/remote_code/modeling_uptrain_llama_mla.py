# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
# mypy: allow-untyped-calls
"""Llama whose keys and values are read out of one narrow latent per token (MLA).

This file and uptrain_shared.py are copied into converted checkpoints, where `trust_remote_code=True` loads them
without uptrain. `rope_mode` says where the positions of keys are:

- "decoupled": in one rotary key per token that all heads share, cached with the latent. A decoding step attends over
  the latent itself (absorbed).
- "re-rotate": in every key (pre-RoPE latent). Keys are expanded from the latent and then rotated. Since that rotation
  stands between latent and query, nothing can be absorbed: each step expands and rotates all cached tokens.

The cache holds the latent and the shared rotary key, nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Any

# First of all: it says so where transformers is too old for the imports below.
from .uptrain_shared import (  # isort: split
    AbsorbedDecoding,
    OwnConfig,
    cache_argument,
    register_auto_classes,
    start_causal_lm,
)

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, eager_attention_forward


class UptrainLlamaMLAConfig(OwnConfig, LlamaConfig):
    """Configure a Llama with a latent of `kv_lora_rank` values and a rotary key of `qk_rope_head_dim` per token.

    `attention_scale` multiplies the scores, (qk_nope_head_dim + qk_rope_head_dim)^-½ if not given. `qkv_bias` is
    for q_proj and kv_a_proj_with_mqa, `attention_bias` for o_proj. `head_dim` follows: it is what rotates.
    """

    model_type = "uptrain_llama_mla"
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_mode: str = "decoupled"
    qkv_bias: bool = False
    attention_scale: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # LlamaRotaryEmbedding takes its width from head_dim.
        self.head_dim = self.qk_rope_head_dim if self.rope_mode == "decoupled" else self.qk_nope_head_dim
        super().__post_init__(**kwargs)
        # By this name generate() knows that a static cache can't be shaped from the config.
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        if self.rope_mode not in ATTENTIONS:
            raise ValueError(f"rope_mode must be one of {', '.join(ATTENTIONS)}, not {self.rope_mode}.")
        if self.kv_lora_rank < 1 or self.v_head_dim < 1 or self.qk_nope_head_dim < 0:
            raise ValueError("kv_lora_rank and v_head_dim must be at least 1, qk_nope_head_dim at least 0.")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"rope_mode {self.rope_mode} rotates pairs, but its keys have {self.head_dim} dimensions.")
        if self.rope_mode == "re-rotate" and self.qk_rope_head_dim:
            raise ValueError("rope_mode re-rotate has no shared rotary key: qk_rope_head_dim must be 0.")
        if self.rope_mode == "decoupled" and self.num_key_value_heads != self.num_attention_heads:
            raise ValueError("rope_mode decoupled has a key per query head: num_key_value_heads must be as many.")
        if self.attention_scale is None:
            self.attention_scale = self.qk_head_dim**-0.5


CACHE = cache_argument(LlamaAttention)


def rotate(pairs: Sequence[torch.Tensor], angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate pairs, first and second halves (batch, heads, tokens, pairs), by cos and sin (batch, tokens, 2·pairs)."""
    first, second = pairs
    cos, sin = (part[..., : first.shape[-1]].unsqueeze(1) for part in angles)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class UptrainLlamaMLAAttention(AbsorbedDecoding, LlamaAttention):
    """Attend with per-head keys from the latent and one rotary key, its rows (2p, 2p+1) a pair, for all heads."""

    def __init__(self, config: UptrainLlamaMLAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.k_proj, self.v_proj
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        key_value_heads = config.num_key_value_heads or heads
        self.scaling = config.attention_scale
        self.qk_head_dim = config.qk_head_dim
        self.q_sizes = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self.latent_sizes = [rank, config.qk_rope_head_dim]
        self.kv_sizes = [config.qk_nope_head_dim, config.v_head_dim]
        self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=config.qkv_bias)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, sum(self.latent_sizes), bias=config.qkv_bias)
        self.kv_b_proj = nn.Linear(rank, key_value_heads * sum(self.kv_sizes), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=config.attention_bias)

    def expand_kv(self, latent: torch.Tensor, key_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (batch, heads, cached, dim) of what is cached, each (batch, 1, cached, width)."""
        heads = self.kv_b_proj(latent[:, 0]).unflatten(-1, (-1, sum(self.kv_sizes)))
        key, value = heads.transpose(1, 2).split(self.kv_sizes, dim=-1)
        return torch.cat([key, key_rope.expand(-1, key.shape[1], -1, -1)], dim=-1), value

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over hidden_states (batch, tokens, hidden_size) and the cache of latents and rotary keys."""
        cache: Cache | None = kwargs.pop(CACHE, None)
        batch, tokens = hidden_states.shape[:2]
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        query, query_rope = query.split(self.q_sizes, dim=-1)
        query_rope = rotate((query_rope[..., 0::2], query_rope[..., 1::2]), position_embeddings)
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1).split(self.latent_sizes, dim=-1)
        key_rope = rotate((key_rope[..., 0::2], key_rope[..., 1::2]), position_embeddings)
        absorbed = False
        if cache is not None:
            latent, key_rope = cache.update(latent, key_rope, self.layer_idx, kwargs=kwargs)
            absorbed = self.absorbs(tokens, latent, attention_mask)

        if absorbed:
            query, key, attention_mask = self.absorb_queries(query, latent, attention_mask, (query_rope, key_rope))
            value = key
            kwargs["is_causal"] = False  # the mask says it all; folded heads aren't later tokens
        else:
            query = torch.cat([query, query_rope], dim=-1)
            key, value = self.expand_kv(latent, key_rope)

        attention_interface: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = (
            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        )
        # vLLM reads this method's source: one interface call, with its scaling an attribute of self.
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if absorbed:
            attn_output, attn_weights = self.expand_output(attn_output, attn_weights, tokens)
        attn_output = attn_output.reshape(batch, tokens, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class UptrainLlamaPreRopeAttention(UptrainLlamaMLAAttention):
    """Attend with num_key_value_heads keys, expanded from the latent and then rotated in halves as Llama's are."""

    def __init__(self, config: UptrainLlamaMLAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over hidden_states (batch, tokens, hidden_size) and the cache, which holds the latent only."""
        cache: Cache | None = kwargs.pop(CACHE, None)
        batch, tokens = hidden_states.shape[:2]
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        latent = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        query_angles = key_angles = position_embeddings
        if cache is not None:
            # Only distances matter, and those of cached tokens are right for padded rows too. A static cache updates
            # the length it has given, and its free places must not make the rotation think the text is longer.
            places = torch.arange(tokens, device=latent.device) + cache.get_seq_length(self.layer_idx)
            latent, _ = cache.update(latent, latent[..., :0], self.layer_idx, kwargs=kwargs)
            positions = torch.arange(latent.shape[2], device=latent.device).clamp(max=places[-1])
            cos, sin = key_angles = self.rotary_emb(latent, positions.unsqueeze(0))
            query_angles = cos[:, places], sin[:, places]

        key, value = self.expand_kv(latent, latent[..., :0])
        query = rotate(query.chunk(2, dim=-1), query_angles)
        key = rotate(key.chunk(2, dim=-1), key_angles)
        attention_interface: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = (
            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        )
        # vLLM reads this method's source: one interface call, with its scaling an attribute of self.
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(batch, tokens, -1).contiguous()), attn_weights


ATTENTIONS: dict[str, type[UptrainLlamaMLAAttention]] = {
    "decoupled": UptrainLlamaMLAAttention,
    "re-rotate": UptrainLlamaPreRopeAttention,
}


class UptrainLlamaMLAModel(LlamaModel):
    """Give the last hidden states of a Llama with latent keys and values."""

    config: UptrainLlamaMLAConfig
    config_class = UptrainLlamaMLAConfig

    def __init__(self, config: UptrainLlamaMLAConfig) -> None:
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = ATTENTIONS[config.rope_mode](config, layer_idx)
        self.post_init()


class UptrainLlamaMLAForCausalLM(LlamaForCausalLM):
    """Give next-token logits of a Llama with latent keys and values."""

    config: UptrainLlamaMLAConfig
    config_class = UptrainLlamaMLAConfig

    def __init__(self, config: UptrainLlamaMLAConfig) -> None:
        start_causal_lm(self, LlamaForCausalLM, config)
        self.model = UptrainLlamaMLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


register_auto_classes(UptrainLlamaMLAConfig, UptrainLlamaMLAModel, UptrainLlamaMLAForCausalLM)
