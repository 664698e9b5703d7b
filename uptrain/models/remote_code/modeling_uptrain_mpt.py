# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""MPT whose query heads share key/value heads (GQA, MQA).

One self-contained file: it is copied into converted checkpoints, where `trust_remote_code=True` loads it
without uptrain. Apart from `Wqkv`, which is narrower, every tensor has MPT's name, shape and bytes.
"""

import inspect
from typing import Any, ClassVar

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"This model's class needs transformers 5 or newer; here is {transformers.__version__}.")

from torch import nn
from transformers import MptConfig, MptForCausalLM, MptModel
from transformers.cache_utils import Cache
from transformers.models.mpt.modeling_mpt import MptAttention


class UptrainMptConfig(MptConfig):
    """Configure an MPT with `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_mpt"
    # The longest text, beyond which ALiBi's table ends, by the name that callers look for.
    attribute_map: ClassVar[dict[str, str]] = {
        **MptConfig.attribute_map, "max_position_embeddings": "max_seq_len",
    }  # fmt: skip

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # save_pretrained names only the saved class here; AutoModel looks for itself.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "modeling_uptrain_mpt.UptrainMptConfig",
                "AutoModel": "modeling_uptrain_mpt.UptrainMptModel",
                "AutoModelForCausalLM": "modeling_uptrain_mpt.UptrainMptForCausalLM",
            },
        )
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.n_heads
        if self.num_key_value_heads < 1 or self.n_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide n_heads {self.n_heads}.")


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
        # Past MptForCausalLM's own __init__, which would build the whole model a second time.
        super(MptForCausalLM, self).__init__(config)
        # transformers derives it from class names it knows, and warns at the first loss when it can't.
        self.loss_type = "ForCausalLM"
        self.transformer = UptrainMptModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# save_pretrained then copies this file beside the weights.
UptrainMptConfig.register_for_auto_class()
UptrainMptModel.register_for_auto_class("AutoModel")
UptrainMptForCausalLM.register_for_auto_class("AutoModelForCausalLM")
