# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""GPT-Neo whose query heads share key/value heads (GQA, MQA).

One self-contained file: it is copied into converted checkpoints, where `trust_remote_code=True` loads it
without uptrain. Apart from `k_proj` and `v_proj`, which are narrower, every tensor has GPT-Neo's name, shape and bytes.
"""

from typing import Any

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"This model's class needs transformers 5 or newer; here is {transformers.__version__}.")

from torch import nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM, GPTNeoModel
from transformers.cache_utils import Cache
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention


class UptrainGPTNeoConfig(GPTNeoConfig):
    """Configure a GPT-Neo with `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_gpt_neo"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # save_pretrained names only the saved class here; AutoModel looks for itself.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "modeling_uptrain_gpt_neo.UptrainGPTNeoConfig",
                "AutoModel": "modeling_uptrain_gpt_neo.UptrainGPTNeoModel",
                "AutoModelForCausalLM": "modeling_uptrain_gpt_neo.UptrainGPTNeoForCausalLM",
            },
        )
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_heads
        if self.num_key_value_heads < 1 or self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_heads {self.num_heads}."
            )


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
        # Past GPTNeoForCausalLM's own __init__, which would build the whole model a second time.
        super(GPTNeoForCausalLM, self).__init__(config)
        # transformers derives it from class names it knows, and warns at the first loss when it can't.
        self.loss_type = "ForCausalLM"
        self.transformer = UptrainGPTNeoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# save_pretrained then copies this file beside the weights.
UptrainGPTNeoConfig.register_for_auto_class()
UptrainGPTNeoModel.register_for_auto_class("AutoModel")
UptrainGPTNeoForCausalLM.register_for_auto_class("AutoModelForCausalLM")
