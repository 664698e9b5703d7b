# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""GPT-Neo whose query heads share key/value heads (GQA, MQA).

This file and uptrain_shared.py are copied into converted checkpoints, where `trust_remote_code=True` loads them
without uptrain. Apart from `k_proj` and `v_proj`, which are narrower, every tensor has GPT-Neo's name, shape and bytes.
"""

from typing import Any

# First of all: it says so where transformers is too old for the imports below.
from .uptrain_shared import RepeatedHeads, SharedHeadsConfig, register_auto_classes, start_causal_lm  # isort: split

import torch
from torch import nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM, GPTNeoModel
from transformers.cache_utils import Cache
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention


class UptrainGPTNeoConfig(SharedHeadsConfig, GPTNeoConfig):
    """Configure a GPT-Neo with `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_gpt_neo"
    query_heads = "num_heads"

    num_key_value_heads: int | None = None


class UptrainGPTNeoSelfAttention(GPTNeoSelfAttention):
    """Attend with H query heads over G key/value heads, everywhere or to the last `window_size` tokens."""

    def __init__(self, config: UptrainGPTNeoConfig, attention_type: str, layer_id: int) -> None:
        super().__init__(config, attention_type, layer_id)
        groups = config.num_key_value_heads or config.num_heads
        self.num_key_value_groups = self.num_heads // groups
        self.k_proj = nn.Linear(self.embed_dim, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(self.embed_dim, groups * self.head_dim, bias=False)

    def _split_heads(self, tensor: torch.Tensor, num_heads: int, attn_head_size: int) -> Any:
        """Split (batch, tokens, heads·dim) into (batch, heads, tokens, dim), whatever the number of heads."""
        return tensor.unflatten(-1, (-1, attn_head_size)).transpose(1, 2)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        layer_past: Cache | None,  # no default: not to be given it, under another name, must not pass unseen
        **kwargs: Any,
    ) -> Any:
        """Attend as GPT-Neo does over hidden_states (batch, tokens, hidden_size), with a cache of the G heads only."""
        shared = RepeatedHeads(layer_past, self.num_key_value_groups)
        return super().forward(hidden_states, attention_mask, shared, **kwargs)


class UptrainGPTNeoModel(GPTNeoModel):
    """Give the last hidden states of a GPT-Neo with shared key/value heads."""

    config: UptrainGPTNeoConfig
    config_class = UptrainGPTNeoConfig
    # Its kernel is chosen in a class of transformers' own that has one key/value head per query head.
    _supports_flash_attn = False

    def __init__(self, config: UptrainGPTNeoConfig) -> None:
        super().__init__(config)
        for layer_idx, kind in enumerate(config.attention_layers):
            holder = self.h.get_submodule(f"{layer_idx}.attn")
            holder.attention = UptrainGPTNeoSelfAttention(config, kind, layer_idx)
        self.post_init()


class UptrainGPTNeoForCausalLM(GPTNeoForCausalLM):
    """Give next-token logits of a GPT-Neo with shared key/value heads."""

    config: UptrainGPTNeoConfig
    config_class = UptrainGPTNeoConfig
    _supports_flash_attn = False

    def __init__(self, config: UptrainGPTNeoConfig) -> None:
        start_causal_lm(self, GPTNeoForCausalLM, config)
        self.transformer = UptrainGPTNeoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


register_auto_classes(UptrainGPTNeoConfig, UptrainGPTNeoModel, UptrainGPTNeoForCausalLM)
