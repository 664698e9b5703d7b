# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""UMT5 whose decoder's query heads share key/value heads (GQA, MQA): over its own text, and the encoder's output.

This file and uptrain_shared.py are copied into converted checkpoints, where `trust_remote_code=True` loads them
without uptrain. Apart from the decoder's `k` and `v`, which are narrower, every tensor has UMT5's name, shape and
bytes.
"""

from typing import Any

# First of all: it says so where transformers is too old for the imports below.
from .uptrain_shared import ConfigWithKernel, SharedHeadsConfig, register_auto_classes, repeated_heads_kernel  # isort: split

import torch
from torch import nn
from transformers import UMT5Config, UMT5ForConditionalGeneration, UMT5Model
from transformers.models.t5.modeling_t5 import T5Attention, eager_attention_forward


class UptrainUMT5Config(SharedHeadsConfig, UMT5Config):
    """Configure a UMT5 whose decoder has `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_umt5"
    query_heads = "num_heads"

    num_key_value_heads: int | None = None


KERNEL = repeated_heads_kernel("uptrain_umt5_eager", eager_attention_forward)


class UptrainUMT5Attention(T5Attention):
    """Attend with H query heads over G key/value heads, which are all that the cache holds.

    UMT5's attention is T5's with a bias of each layer's own, but fixes the number of heads that T5's reads off `k`.
    """

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        groups = config.num_key_value_heads or config.num_heads
        self.num_key_value_groups = self.n_heads // groups
        self.k = nn.Linear(self.d_model, groups * self.key_value_proj_dim, bias=False)
        self.v = nn.Linear(self.d_model, groups * self.key_value_proj_dim, bias=False)
        self.config = ConfigWithKernel(config, KERNEL)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend as UMT5 does over hidden_states (batch, tokens, d_model), or over an encoder's."""
        output, _, weights = super().forward(hidden_states, attention_mask, encoder_hidden_states, **kwargs)
        return output, weights


def share_heads(decoder: Any) -> None:
    """Put attention with shared heads into every layer of a decoder."""
    for layer_idx, block in enumerate(decoder.block):
        own, cross = block.layer[0], block.layer[1]
        own.SelfAttention = UptrainUMT5Attention(
            decoder.config, has_relative_attention_bias=True, layer_idx=layer_idx, is_causal=True
        )
        cross.EncDecAttention = UptrainUMT5Attention(decoder.config, layer_idx=layer_idx)


class UptrainUMT5Model(UMT5Model):
    """Give the last hidden states of a UMT5 whose decoder shares key/value heads."""

    config: UptrainUMT5Config
    config_class = UptrainUMT5Config

    def __init__(self, config: UptrainUMT5Config) -> None:
        super().__init__(config)
        share_heads(self.decoder)
        self.post_init()


class UptrainUMT5ForConditionalGeneration(UMT5ForConditionalGeneration):
    """Give next-token logits of a UMT5 whose decoder shares key/value heads."""

    config: UptrainUMT5Config
    config_class = UptrainUMT5Config

    def __init__(self, config: UptrainUMT5Config) -> None:
        super().__init__(config)
        share_heads(self.decoder)
        self.post_init()


register_auto_classes(UptrainUMT5Config, UptrainUMT5Model, UptrainUMT5ForConditionalGeneration, "AutoModelForSeq2SeqLM")
