# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""GPT-2 whose query heads share key/value heads (GQA, MQA).

One self-contained file: it is copied into converted checkpoints, where `trust_remote_code=True` loads it
without uptrain. Apart from `attn.c_attn`, which is narrower, every tensor has GPT-2's name, shape and bytes.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"This model's class needs transformers 5 or newer; here is {transformers.__version__}.")

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D


class UptrainGPT2Config(GPT2Config):
    """Configure a GPT-2 with `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_gpt2"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # save_pretrained names only the saved class here; vLLM looks for AutoModel, and AutoModel for itself.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "modeling_uptrain_gpt2.UptrainGPT2Config",
                "AutoModel": "modeling_uptrain_gpt2.UptrainGPT2Model",
                "AutoModelForCausalLM": "modeling_uptrain_gpt2.UptrainGPT2LMHeadModel",
            },
        )
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.n_head
        if self.num_key_value_heads < 1 or self.n_head % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide n_head {self.n_head}.")
        if self.add_cross_attention:
            raise ValueError("uptrain_gpt2 has no cross-attention: add_cross_attention must be false.")


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
CACHE = cache_argument(GPT2Attention)


def repeat_kv(heads: torch.Tensor, repeats: int) -> torch.Tensor:
    """Repeat each head of (batch, heads, tokens, dim) in a row, into (batch, heads·repeats, tokens, dim)."""
    return heads if repeats == 1 else heads.repeat_interleave(repeats, dim=1)


def eager_attention_forward(
    module: "UptrainGPT2Attention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend in plain products: query (batch, heads, tokens, dim) to output (batch, tokens, heads, dim)."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    if module.reorder_and_upcast_attn:
        output, weights = module._upcast_and_reordered_attn(query, key, value, attention_mask)
        return output, weights
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1).type(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


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
            ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
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
        # Past GPT2LMHeadModel's own __init__, which would build the whole model a second time.
        super(GPT2LMHeadModel, self).__init__(config)
        # transformers derives it from class names it knows, and warns at the first loss when it can't.
        self.loss_type = "ForCausalLM"
        self.transformer = UptrainGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()


# save_pretrained then copies this file beside the weights.
UptrainGPT2Config.register_for_auto_class()
UptrainGPT2Model.register_for_auto_class("AutoModel")
UptrainGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
