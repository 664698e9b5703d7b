# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""T5 whose decoder's query heads share key/value heads (GQA, MQA), over the text so far and over the encoder's output.

One self-contained file: it is copied into converted checkpoints, where `trust_remote_code=True` loads it
without uptrain. Apart from the decoder's `k` and `v`, which are narrower, every tensor has T5's name, shape and bytes.
"""

from typing import Any

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"This model's class needs transformers 5 or newer; here is {transformers.__version__}.")

from torch import nn
from transformers import AttentionInterface, T5Config, T5ForConditionalGeneration, T5Model
from transformers.models.t5.modeling_t5 import T5Attention, eager_attention_forward


class UptrainT5Config(T5Config):
    """Configure a T5 whose decoder has `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_t5"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # save_pretrained names only the saved class here; AutoModel looks for itself.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "modeling_uptrain_t5.UptrainT5Config",
                "AutoModel": "modeling_uptrain_t5.UptrainT5Model",
                "AutoModelForSeq2SeqLM": "modeling_uptrain_t5.UptrainT5ForConditionalGeneration",
            },
        )
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_heads
        if self.num_key_value_heads < 1 or self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_heads {self.num_heads}."
            )


def repeated_heads_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Attend as T5's eager kernel does, with keys and values (batch, G, tokens, dim) repeated for H query heads."""
    key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
    return eager_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register("uptrain_t5_eager", repeated_heads_forward)


class Kernel:
    """Name the kernel that a config asks for, with ours for "eager": T5's own knows no shared heads, all others do."""

    def __init__(self, config: T5Config) -> None:
        self._config = config

    @property
    def _attn_implementation(self) -> str:
        name = str(self._config._attn_implementation)
        return "uptrain_t5_eager" if name == "eager" else name


class UptrainT5Attention(T5Attention):
    """Attend with H query heads over G key/value heads, which are all that the cache holds."""

    def __init__(self, config: UptrainT5Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        groups = config.num_key_value_heads or config.num_heads
        self.num_key_value_groups = self.n_heads // groups
        self.k = nn.Linear(self.d_model, groups * self.key_value_proj_dim, bias=False)
        self.v = nn.Linear(self.d_model, groups * self.key_value_proj_dim, bias=False)
        self.config = Kernel(config)  # type: ignore[assignment]


def share_heads(decoder: Any) -> None:
    """Put attention with shared heads into every layer of a decoder."""
    for layer_idx, block in enumerate(decoder.block):
        own, cross = block.layer[0], block.layer[1]
        own.SelfAttention = UptrainT5Attention(
            decoder.config, has_relative_attention_bias=layer_idx == 0, layer_idx=layer_idx, is_causal=True
        )
        cross.EncDecAttention = UptrainT5Attention(decoder.config, layer_idx=layer_idx)


class UptrainT5Model(T5Model):
    """Give the last hidden states of a T5 whose decoder shares key/value heads."""

    config: UptrainT5Config
    config_class = UptrainT5Config

    def __init__(self, config: UptrainT5Config) -> None:
        super().__init__(config)
        share_heads(self.decoder)
        self.post_init()


class UptrainT5ForConditionalGeneration(T5ForConditionalGeneration):
    """Give next-token logits of a T5 whose decoder shares key/value heads."""

    config: UptrainT5Config
    config_class = UptrainT5Config

    def __init__(self, config: UptrainT5Config) -> None:
        super().__init__(config)
        share_heads(self.decoder)
        self.post_init()


# save_pretrained then copies this file beside the weights.
UptrainT5Config.register_for_auto_class()
UptrainT5Model.register_for_auto_class("AutoModel")
UptrainT5ForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
