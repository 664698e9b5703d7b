# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""T5 whose decoder's query heads share key/value heads (GQA, MQA), over the text so far and over the encoder's output.

This file and uptrain_shared.py are copied into converted checkpoints, where `trust_remote_code=True` loads them
without uptrain. Apart from the decoder's `k` and `v`, which are narrower, every tensor has T5's name, shape and bytes.
"""

from typing import Any

# First of all: it says so where transformers is too old for the imports below.
from .uptrain_shared import ConfigWithKernel, SharedHeadsConfig, register_auto_classes, repeated_heads_kernel  # isort: split

from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, T5Model
from transformers.models.t5.modeling_t5 import T5Attention, eager_attention_forward


class UptrainT5Config(SharedHeadsConfig, T5Config):
    """Configure a T5 whose decoder has `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_t5"
    query_heads = "num_heads"

    num_key_value_heads: int | None = None


KERNEL = repeated_heads_kernel("uptrain_t5_eager", eager_attention_forward)


class UptrainT5Attention(T5Attention):
    """Attend with H query heads over G key/value heads, which are all that the cache holds."""

    def __init__(self, config: UptrainT5Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        groups = config.num_key_value_heads or config.num_heads
        self.num_key_value_groups = self.n_heads // groups
        self.k = nn.Linear(self.d_model, groups * self.key_value_proj_dim, bias=False)
        self.v = nn.Linear(self.d_model, groups * self.key_value_proj_dim, bias=False)
        self.config = ConfigWithKernel(config, KERNEL)  # type: ignore[assignment]


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


register_auto_classes(UptrainT5Config, UptrainT5Model, UptrainT5ForConditionalGeneration, "AutoModelForSeq2SeqLM")
