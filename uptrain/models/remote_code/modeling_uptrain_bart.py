# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""BART whose decoder's query heads share key/value heads (GQA, MQA): over its own text, and the encoder's output.

This file and uptrain_shared.py are copied into converted checkpoints, where `trust_remote_code=True` loads them
without uptrain. Apart from the decoder's `k_proj` and `v_proj`, which are narrower, every tensor has BART's name,
shape and bytes.
"""

from typing import Any

# First of all: it says so where transformers is too old for the imports below.
from .uptrain_shared import ConfigWithKernel, SharedHeadsConfig, register_auto_classes, repeated_heads_kernel  # isort: split

from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, BartModel
from transformers.models.bart.modeling_bart import BartAttention, eager_attention_forward


class UptrainBartConfig(SharedHeadsConfig, BartConfig):
    """Configure a BART whose decoder has `num_key_value_heads` key/value heads; None means one per query head."""

    model_type = "uptrain_bart"
    query_heads = "decoder_attention_heads"

    num_key_value_heads: int | None = None


KERNEL = repeated_heads_kernel("uptrain_bart_eager", eager_attention_forward)


class UptrainBartAttention(BartAttention):
    """Attend with H query heads over G key/value heads, which are all that the cache holds."""

    def __init__(self, config: Any, layer_idx: int, is_causal: bool) -> None:
        heads, groups = config.decoder_attention_heads, config.num_key_value_heads
        super().__init__(
            config.d_model,
            heads,
            dropout=config.attention_dropout,
            is_decoder=True,
            is_causal=is_causal,
            config=config,
            layer_idx=layer_idx,
        )
        self.num_key_value_groups = heads // groups
        self.k_proj = nn.Linear(self.embed_dim, groups * self.head_dim)
        self.v_proj = nn.Linear(self.embed_dim, groups * self.head_dim)
        self.config = ConfigWithKernel(config, KERNEL)  # type: ignore[assignment]


def share_heads(decoder: Any) -> None:
    """Put attention with shared heads into every layer of a decoder."""
    for layer_idx, layer in enumerate(decoder.layers):
        layer.self_attn = UptrainBartAttention(decoder.config, layer_idx, is_causal=True)
        layer.encoder_attn = UptrainBartAttention(decoder.config, layer_idx, is_causal=False)


class UptrainBartModel(BartModel):
    """Give the last hidden states of a BART whose decoder shares key/value heads."""

    config: UptrainBartConfig
    config_class = UptrainBartConfig

    def __init__(self, config: UptrainBartConfig) -> None:
        super().__init__(config)
        share_heads(self.decoder)
        self.post_init()


class UptrainBartForConditionalGeneration(BartForConditionalGeneration):
    """Give next-token logits of a BART whose decoder shares key/value heads."""

    config: UptrainBartConfig
    config_class = UptrainBartConfig

    def __init__(self, config: UptrainBartConfig) -> None:
        super().__init__(config)
        share_heads(self.model.decoder)
        self.post_init()


register_auto_classes(UptrainBartConfig, UptrainBartModel, UptrainBartForConditionalGeneration, "AutoModelForSeq2SeqLM")
