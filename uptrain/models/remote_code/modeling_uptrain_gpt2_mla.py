# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
# mypy: allow-untyped-calls
"""GPT-2 whose keys and values are read out of one narrow latent per token (MLA without rotary keys).

This file and uptrain_shared.py are copied into converted checkpoints, where `trust_remote_code=True` loads them
without uptrain. Outside `attn`, every tensor has GPT-2's name, shape and bytes; the cache holds the latent only.
"""

from collections.abc import Callable
from typing import Any, cast

# First of all: it says so where transformers is too old for the imports below.
from .uptrain_shared import (  # isort: split
    AbsorbedDecoding,
    OwnConfig,
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


class UptrainGPT2MLAConfig(OwnConfig, GPT2Config):
    """Configure a GPT-2 with a latent of `kv_lora_rank` values; sizes that aren't given are GPT-2's, nothing lost."""

    model_type = "uptrain_gpt2_mla"

    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int = 0
    v_head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        head_dim = self.n_embd // self.n_head
        self.kv_lora_rank = 2 * self.n_embd if self.kv_lora_rank is None else self.kv_lora_rank
        self.qk_nope_head_dim = head_dim if self.qk_nope_head_dim is None else self.qk_nope_head_dim
        self.v_head_dim = head_dim if self.v_head_dim is None else self.v_head_dim
        # By this name generate() knows that a static cache can't be shaped from the config.
        self.qk_head_dim = self.qk_nope_head_dim
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.qk_rope_head_dim:
            raise ValueError("uptrain_gpt2_mla has no rotary keys: qk_rope_head_dim must be 0.")
        if self.add_cross_attention:
            raise ValueError("uptrain_gpt2_mla has no cross-attention: add_cross_attention must be false.")


CACHE = cache_argument(GPT2Attention)


class UptrainGPT2MLAAttention(AbsorbedDecoding, GPT2Attention):
    """Attend over keys and values that `kv_b_proj` gives, per head [key | value], from the cached latent."""

    def __init__(self, config: UptrainGPT2MLAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        del self.c_attn
        # The config has put numbers where None was.
        rank = cast(int, config.kv_lora_rank)
        self.latent_sizes = [rank, 0]
        self.kv_sizes = [cast(int, config.qk_nope_head_dim), cast(int, config.v_head_dim)]
        self.q_proj = nn.Linear(self.embed_dim, self.num_heads * self.kv_sizes[0])
        self.kv_a_proj_with_mqa = nn.Linear(self.embed_dim, rank)
        self.kv_b_proj = nn.Linear(rank, self.num_heads * sum(self.kv_sizes), bias=False)
        self.c_proj = Conv1D(self.embed_dim, self.num_heads * self.kv_sizes[1])

    def expand_kv(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (batch, heads, cached, dim) of the latent (batch, 1, cached, kv_lora_rank)."""
        heads = self.kv_b_proj(latent[:, 0]).unflatten(-1, (-1, sum(self.kv_sizes)))
        key, value = heads.transpose(1, 2).split(self.kv_sizes, dim=-1)
        return key, value

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over hidden_states (batch, tokens, n_embd) and the cache, which holds the latent only."""
        cache: Cache | None = kwargs.pop(CACHE, None)
        batch, tokens = hidden_states.shape[:2]
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.kv_sizes[0])).transpose(1, 2)
        latent = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        absorbed = False
        if cache is not None:
            latent, _ = cache.update(latent, latent[..., :0], self.layer_idx, kwargs=kwargs)
            absorbed = self.absorbs(tokens, latent, attention_mask)

        if absorbed:
            query, key, attention_mask = self.absorb_queries(query, latent, attention_mask)
            value = key
            kwargs["is_causal"] = False  # the mask says it all; folded heads aren't later tokens
        else:
            key, value = self.expand_kv(latent)

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
        if absorbed:
            attn_output, attn_weights = self.expand_output(attn_output, attn_weights, tokens)
        attn_output = attn_output.reshape(batch, tokens, -1).contiguous()
        return self.resid_dropout(self.c_proj(attn_output)), attn_weights


class UptrainGPT2MLAModel(GPT2Model):
    """Give the last hidden states of a GPT-2 with latent keys and values."""

    config: UptrainGPT2MLAConfig
    config_class = UptrainGPT2MLAConfig

    def __init__(self, config: UptrainGPT2MLAConfig) -> None:
        super().__init__(config)
        for layer_idx, block in enumerate(self.h):
            block.attn = UptrainGPT2MLAAttention(config, layer_idx)
        self.post_init()


class UptrainGPT2MLALMHeadModel(GPT2LMHeadModel):
    """Give next-token logits of a GPT-2 with latent keys and values."""

    config: UptrainGPT2MLAConfig
    config_class = UptrainGPT2MLAConfig

    def __init__(self, config: UptrainGPT2MLAConfig) -> None:
        start_causal_lm(self, GPT2LMHeadModel, config)
        self.transformer = UptrainGPT2MLAModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()


register_auto_classes(UptrainGPT2MLAConfig, UptrainGPT2MLAModel, UptrainGPT2MLALMHeadModel)
