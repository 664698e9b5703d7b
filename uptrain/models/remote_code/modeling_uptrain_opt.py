# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""OPT whose query heads share key/value heads (GQA, MQA).

One self-contained file: it is copied into converted checkpoints, where `trust_remote_code=True` loads it
without uptrain. Apart from `k_proj` and `v_proj`, which are narrower, every tensor has OPT's name, shape and bytes.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"This model's class needs transformers 5 or newer; here is {transformers.__version__}.")

from torch import nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.models.opt.modeling_opt import OPTAttention


class UptrainOPTConfig(OPTConfig):
    """Configure an OPT with `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_opt"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # save_pretrained names only the saved class here; vLLM looks for AutoModel, and AutoModel for itself.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "modeling_uptrain_opt.UptrainOPTConfig",
                "AutoModel": "modeling_uptrain_opt.UptrainOPTModel",
                "AutoModelForCausalLM": "modeling_uptrain_opt.UptrainOPTForCausalLM",
            },
        )
        super().__post_init__(**kwargs)
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.num_key_value_heads < 1 or heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide {heads} attention heads.")


def cache_argument(attention: type[nn.Module]) -> str:
    """Return under which name this transformers gives a layer the cache: `cache`, or `past_key_values` before 5.24.

    Raises:
        ImportError: under another, and a layer that leaves its cache empty would write nonsense.
    """
    for name in ("cache", "past_key_values"):
        if name in inspect.signature(attention.forward).parameters:
            return name
    raise ImportError(
        f"transformers {transformers.__version__} gives {attention.__name__} the cache under a name that this file "
        "doesn't know. Use an older transformers, or convert again with a newer uptrain."
    )


# Before 5.24 a layer was also given a `cache`: continuous batching's, which the kernel takes out of kwargs itself.
CACHE = cache_argument(OPTAttention)


class UptrainOPTAttention(OPTAttention):
    """Attend with H query heads over G key/value heads."""

    layer_idx: int

    def __init__(self, config: UptrainOPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        groups = config.num_key_value_heads or self.num_heads
        # The name that every attention interface of transformers, and vLLM, looks for.
        self.num_key_value_groups = self.num_heads // groups
        self.k_proj = nn.Linear(self.embed_dim, groups * self.head_dim, bias=self.enable_bias)
        self.v_proj = nn.Linear(self.embed_dim, groups * self.head_dim, bias=self.enable_bias)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend over hidden_states (batch, tokens, hidden_size) and the cache, which holds the G heads only."""
        cache: Cache | None = kwargs.pop(CACHE, None)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)

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
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.out_proj(attn_output), attn_weights


class UptrainOPTModel(OPTModel):
    """Give the last hidden states of an OPT with shared key/value heads."""

    config: UptrainOPTConfig
    config_class = UptrainOPTConfig

    def __init__(self, config: UptrainOPTConfig) -> None:
        super().__init__(config)
        for layer_idx, layer in enumerate(self.decoder.layers):
            layer.self_attn = UptrainOPTAttention(config, layer_idx)
        self.post_init()


class UptrainOPTForCausalLM(OPTForCausalLM):
    """Give next-token logits of an OPT with shared key/value heads."""

    config: UptrainOPTConfig
    config_class = UptrainOPTConfig

    def __init__(self, config: UptrainOPTConfig) -> None:
        # Past OPTForCausalLM's own __init__, which would build the whole model a second time.
        super(OPTForCausalLM, self).__init__(config)
        # transformers derives it from class names it knows, and warns at the first loss when it can't.
        self.loss_type = "ForCausalLM"
        self.model = UptrainOPTModel(config)
        self.lm_head = nn.Linear(self.model.decoder.embed_tokens.embedding_dim, config.vocab_size, bias=False)
        self.post_init()


# save_pretrained then copies this file beside the weights.
UptrainOPTConfig.register_for_auto_class()
UptrainOPTModel.register_for_auto_class("AutoModel")
UptrainOPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
