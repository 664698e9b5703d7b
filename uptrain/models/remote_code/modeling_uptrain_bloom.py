# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""BLOOM whose query heads share key/value heads (GQA, MQA).

This file and uptrain_shared.py are copied into converted checkpoints, where `trust_remote_code=True` loads them
without uptrain. Apart from `query_key_value`, which is narrower, every tensor has BLOOM's name, shape and bytes.
"""

from typing import Any

# First of all: it says so where transformers is too old for the imports below.
from .uptrain_shared import RepeatedHeads, SharedHeadsConfig, register_auto_classes, start_causal_lm  # isort: split

import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, BloomModel
from transformers.cache_utils import Cache
from transformers.models.bloom.modeling_bloom import BloomAttention


class UptrainBloomConfig(SharedHeadsConfig, BloomConfig):
    """Configure a BLOOM with `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_bloom"
    query_heads = "n_head"

    num_key_value_heads: int | None = None


class UptrainBloomAttention(BloomAttention):
    """Attend with H query heads over G key/value heads; `query_key_value` gives each group's queries, key, value."""

    def __init__(self, config: UptrainBloomConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.num_key_value_heads = config.num_key_value_heads or config.n_head
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        rows = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.query_key_value = nn.Linear(self.hidden_size, rows, bias=True)

    def _reshape(self, fused_qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split (batch, tokens, rows) into queries (batch, H, tokens, dim), keys and values (batch, G, tokens, dim)."""
        heads = fused_qkv.unflatten(-1, (self.num_key_value_heads, self.num_key_value_groups + 2, self.head_dim))
        queries = heads[..., :-2, :].flatten(2, 3).transpose(1, 2)
        return queries, heads[..., -2, :].transpose(1, 2), heads[..., -1, :].transpose(1, 2)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: torch.Tensor,
        layer_past: Cache | None,  # no default: not to be given it, under another name, must not pass unseen
        **kwargs: Any,
    ) -> Any:
        """Attend as BLOOM does over hidden_states (batch, tokens, hidden_size), with a cache of the G heads only."""
        shared: Any = RepeatedHeads(layer_past, self.num_key_value_groups)
        return super().forward(hidden_states, residual, alibi, attention_mask, shared, **kwargs)


class UptrainBloomModel(BloomModel):
    """Give the last hidden states of a BLOOM with shared key/value heads."""

    config: UptrainBloomConfig
    config_class = UptrainBloomConfig

    def __init__(self, config: UptrainBloomConfig) -> None:
        super().__init__(config)
        for layer_idx, block in enumerate(self.h):
            block.self_attention = UptrainBloomAttention(config, layer_idx)
        self.post_init()


class UptrainBloomForCausalLM(BloomForCausalLM):
    """Give next-token logits of a BLOOM with shared key/value heads."""

    config: UptrainBloomConfig
    config_class = UptrainBloomConfig

    def __init__(self, config: UptrainBloomConfig) -> None:
        start_causal_lm(self, BloomForCausalLM, config)
        self.transformer = UptrainBloomModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


register_auto_classes(UptrainBloomConfig, UptrainBloomModel, UptrainBloomForCausalLM)
