# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""GPT-2 whose query heads share key/value heads (GQA, MQA).

This file and uptrain_shared.py are copied into converted checkpoints, where `trust_remote_code=True` loads them
without uptrain. Apart from `attn.c_attn`, which is narrower, every tensor has GPT-2's name, shape and bytes.
"""

from collections.abc import Callable
from typing import Any

# First of all: it says so where transformers is too old for the imports below.
from .uptrain_shared import (  # isort: split
    SharedHeadsConfig,
    cache_argument,
    gpt2_eager_attention_forward,
    register_auto_classes,
    start_causal_lm,
)

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D


class UptrainGPT2Config(SharedHeadsConfig, GPT2Config):
    """Configure a GPT-2 with `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_gpt2"
    query_heads = "n_head"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.add_cross_attention:
            raise ValueError("uptrain_gpt2 has no cross-attention: add_cross_attention must be false.")


CACHE = cache_argument(GPT2Attention)


# GPT-2's classes name "attn.bias", the masks of old checkpoints; vLLM finds it in c_attn.bias too, and drops that.
NOTHING_TO_IGNORE: list[str] = []


class UptrainGPT2Attention(GPT2Attention):
    """Attend with H query heads over G key/value heads; `c_attn` gives [H queries | G keys | G values]."""

    def __init__(self, config: UptrainGPT2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.num_key_value_heads = config.num_key_value_heads or config.n_head
        # The name that every attention interface of transformers, and vLLM, looks for.
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        width = self.num_key_value_heads * self.head_dim
        self.qkv_sizes = [self.embed_dim, width, width]
        self.c_attn = Conv1D(sum(self.qkv_sizes), self.embed_dim)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over hidden_states (batch, tokens, n_embd) and the cache, which holds the G heads only."""
        cache: Cache | None = kwargs.pop(CACHE, None)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = self.c_attn(hidden_states).split(self.qkv_sizes, dim=-1)
        query = query.view(shape).transpose(1, 2)
        key = key.view(shape).transpose(1, 2)
        value = value.view(shape).transpose(1, 2)

        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)

        attention_interface: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = (
            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, gpt2_eager_attention_forward)
        )
        # vLLM reads this method's source: one interface call, with its scaling an attribute of self.
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.resid_dropout(self.c_proj(attn_output)), attn_weights


class UptrainGPT2Model(GPT2Model):
    """Give the last hidden states of a GPT-2 with shared key/value heads."""

    config: UptrainGPT2Config
    config_class = UptrainGPT2Config
    _keys_to_ignore_on_load_unexpected = NOTHING_TO_IGNORE

    def __init__(self, config: UptrainGPT2Config) -> None:
        super().__init__(config)
        for layer_idx, block in enumerate(self.h):
            block.attn = UptrainGPT2Attention(config, layer_idx)
        self.post_init()


class UptrainGPT2LMHeadModel(GPT2LMHeadModel):
    """Give next-token logits of a GPT-2 with shared key/value heads."""

    config: UptrainGPT2Config
    config_class = UptrainGPT2Config
    _keys_to_ignore_on_load_unexpected = NOTHING_TO_IGNORE

    def __init__(self, config: UptrainGPT2Config) -> None:
        start_causal_lm(self, GPT2LMHeadModel, config)
        self.transformer = UptrainGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()


register_auto_classes(UptrainGPT2Config, UptrainGPT2Model, UptrainGPT2LMHeadModel)
