# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""Persimmon whose query heads share key/value heads (GQA, MQA).

This file and uptrain_shared.py are copied into converted checkpoints, where `trust_remote_code=True` loads them
without uptrain. Apart from `query_key_value`, which is narrower, every tensor has Persimmon's name, shape and bytes.
"""

from collections.abc import Callable
from typing import Any

# First of all: it says so where transformers is too old for the imports below.
from .uptrain_shared import SharedHeadsConfig, cache_argument, register_auto_classes, start_causal_lm  # isort: split

import torch
from torch import nn
from transformers import PersimmonConfig, PersimmonForCausalLM, PersimmonModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.models.persimmon.modeling_persimmon import PersimmonAttention, apply_rotary_pos_emb


class UptrainPersimmonConfig(SharedHeadsConfig, PersimmonConfig):
    """Configure a Persimmon with `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_persimmon"

    num_key_value_heads: int | None = None


CACHE = cache_argument(PersimmonAttention)


class UptrainPersimmonAttention(PersimmonAttention):
    """Attend with H query heads over G key/value heads; `query_key_value` gives each group's queries, key, value."""

    layer_idx: int

    def __init__(self, config: UptrainPersimmonConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.num_key_value_heads = config.num_key_value_heads or self.num_heads
        # The name that every attention interface of transformers, and vLLM, looks for.
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        rows = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.query_key_value = nn.Linear(self.hidden_size, rows, bias=True)

    def _split_heads(self, fused_qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split (batch, tokens, rows) into queries (batch, tokens, H, dim), keys and values (batch, tokens, G, dim)."""
        heads = fused_qkv.unflatten(-1, (self.num_key_value_heads, self.num_key_value_groups + 2, self.head_dim))
        return heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over hidden_states (batch, tokens, hidden_size) and the cache, which holds the G heads only."""
        cache: Cache | None = kwargs.pop(CACHE, None)
        query, key, value = self._split_heads(self.query_key_value(hidden_states))
        if self.qk_layernorm:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

        rotated = self.rotary_ndims
        turned = apply_rotary_pos_emb(query[..., :rotated], key[..., :rotated], *position_embeddings)
        query = torch.cat((turned[0], query[..., rotated:]), dim=-1)
        key = torch.cat((turned[1], key[..., rotated:]), dim=-1)

        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)

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
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.dense(attn_output), attn_weights


class UptrainPersimmonModel(PersimmonModel):
    """Give the last hidden states of a Persimmon with shared key/value heads."""

    config: UptrainPersimmonConfig
    config_class = UptrainPersimmonConfig

    def __init__(self, config: UptrainPersimmonConfig) -> None:
        super().__init__(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = UptrainPersimmonAttention(config, layer_idx)
        self.post_init()


class UptrainPersimmonForCausalLM(PersimmonForCausalLM):
    """Give next-token logits of a Persimmon with shared key/value heads."""

    config: UptrainPersimmonConfig
    config_class = UptrainPersimmonConfig

    def __init__(self, config: UptrainPersimmonConfig) -> None:
        start_causal_lm(self, PersimmonForCausalLM, config)
        self.model = UptrainPersimmonModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


register_auto_classes(UptrainPersimmonConfig, UptrainPersimmonModel, UptrainPersimmonForCausalLM)
