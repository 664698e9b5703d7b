# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""BLOOM whose query heads share key/value heads (GQA, MQA).

One self-contained file: it is copied into converted checkpoints, where `trust_remote_code=True` loads it
without uptrain. Apart from `query_key_value`, which is narrower, every tensor has BLOOM's name, shape and bytes.
"""

from typing import Any

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"This model's class needs transformers 5 or newer; here is {transformers.__version__}.")

from torch import nn
from transformers import BloomConfig, BloomForCausalLM, BloomModel
from transformers.cache_utils import Cache
from transformers.models.bloom.modeling_bloom import BloomAttention


class UptrainBloomConfig(BloomConfig):
    """Configure a BLOOM with `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_bloom"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # save_pretrained names only the saved class here; AutoModel looks for itself.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "modeling_uptrain_bloom.UptrainBloomConfig",
                "AutoModel": "modeling_uptrain_bloom.UptrainBloomModel",
                "AutoModelForCausalLM": "modeling_uptrain_bloom.UptrainBloomForCausalLM",
            },
        )
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.n_head
        if self.num_key_value_heads < 1 or self.n_head % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide n_head {self.n_head}.")


class RepeatedHeads:
    """A layer's view of the cache: it keeps the G heads and gives each back for every query head that shares it."""

    def __init__(self, cache: Cache | None, repeats: int) -> None:
        self.cache, self.repeats = cache, repeats

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values, (batch, H, tokens, dim), after adding new ones, (batch, G, tokens, dim)."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer_idx, **kwargs)
        return key.repeat_interleave(self.repeats, dim=1), value.repeat_interleave(self.repeats, dim=1)


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
        slots = fused_qkv.unflatten(-1, (self.num_key_value_heads, self.num_key_value_groups + 2, self.head_dim))
        queries = slots[..., :-2, :].flatten(2, 3).transpose(1, 2)
        return queries, slots[..., -2, :].transpose(1, 2), slots[..., -1, :].transpose(1, 2)

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
        # Past BloomForCausalLM's own __init__, which would build the whole model a second time.
        super(BloomForCausalLM, self).__init__(config)
        # transformers derives it from class names it knows, and warns at the first loss when it can't.
        self.loss_type = "ForCausalLM"
        self.transformer = UptrainBloomModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# save_pretrained then copies this file beside the weights.
UptrainBloomConfig.register_for_auto_class()
UptrainBloomModel.register_for_auto_class("AutoModel")
UptrainBloomForCausalLM.register_for_auto_class("AutoModelForCausalLM")
