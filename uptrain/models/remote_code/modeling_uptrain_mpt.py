# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""MPT whose query heads share key/value heads (GQA, MQA).

This file and uptrain_shared.py are copied into converted checkpoints, where `trust_remote_code=True` loads them
without uptrain. Apart from `Wqkv`, which is narrower, every tensor has MPT's name, shape and bytes.
"""

from typing import Any, ClassVar

# First of all: it says so where transformers is too old for the imports below.
from .uptrain_shared import SharedHeadsConfig, cache_argument, register_auto_classes, start_causal_lm  # isort: split

import torch
from torch import nn
from transformers import MptConfig, MptForCausalLM, MptModel
from transformers.cache_utils import Cache
from transformers.models.mpt.modeling_mpt import MptAttention


class UptrainMptConfig(SharedHeadsConfig, MptConfig):
    """Configure an MPT with `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_mpt"
    query_heads = "n_heads"
    # The longest text, beyond which ALiBi's table ends, by the name that callers look for.
    attribute_map: ClassVar[dict[str, str]] = {
        **MptConfig.attribute_map, "max_position_embeddings": "max_seq_len",
    }  # fmt: skip

    num_key_value_heads: int | None = None


CACHE = cache_argument(MptAttention)


class UptrainMptAttention(MptAttention):
    """Attend with H query heads over G key/value heads; `Wqkv` gives [H queries | G keys | G values]."""

    layer_idx: int
    softmax_scale: float

    def __init__(self, config: UptrainMptConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        groups = config.num_key_value_heads or config.n_heads
        self.num_key_value_groups = self.n_heads // groups
        self.qkv_sizes = [self.hidden_size, groups * self.head_dim, groups * self.head_dim]
        self.Wqkv = nn.Linear(self.hidden_size, sum(self.qkv_sizes), bias=False)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over hidden_states (batch, tokens, d_model) and the cache, which holds the G heads only.

        `position_bias` is (H, 1, max_seq_len), and `attention_mask` (batch, 1, tokens, keys) is true where none may
        look.
        """
        cache: Cache | None = kwargs.pop(CACHE, None)
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (part.view(shape).transpose(1, 2) for part in mixed.split(self.qkv_sizes, dim=-1))

        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        value = value.repeat_interleave(self.num_key_value_groups, dim=1)

        scores = torch.matmul(query, key.transpose(-1, -2)) * self.softmax_scale
        scores = scores + position_bias[..., -key.shape[-2] :]
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask, torch.finfo(query.dtype).min)
        weights = nn.functional.softmax(scores.float(), dim=-1).to(value.dtype)
        weights = nn.functional.dropout(weights, p=self.attn_dropout_p, training=self.training)
        mixed_heads = torch.matmul(weights, value).transpose(1, 2).flatten(2)
        return self.out_proj(mixed_heads), weights


class UptrainMptModel(MptModel):
    """Give the last hidden states of an MPT with shared key/value heads."""

    config: UptrainMptConfig
    config_class = UptrainMptConfig

    def __init__(self, config: UptrainMptConfig) -> None:
        super().__init__(config)
        for layer_idx, block in enumerate(self.blocks):
            block.attn = UptrainMptAttention(config, layer_idx)
        self.post_init()


class UptrainMptForCausalLM(MptForCausalLM):
    """Give next-token logits of an MPT with shared key/value heads."""

    config: UptrainMptConfig
    config_class = UptrainMptConfig

    def __init__(self, config: UptrainMptConfig) -> None:
        start_causal_lm(self, MptForCausalLM, config)
        self.transformer = UptrainMptModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


register_auto_classes(UptrainMptConfig, UptrainMptModel, UptrainMptForCausalLM)
