# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""BART whose decoder's query heads share key/value heads (GQA, MQA): over its own text, and the encoder's output.

One self-contained file: it is copied into converted checkpoints, where `trust_remote_code=True` loads it
without uptrain. Apart from the decoder's `k_proj` and `v_proj`, which are narrower, every tensor has BART's name,
shape and bytes.
"""

from typing import Any

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"This model's class needs transformers 5 or newer; here is {transformers.__version__}.")

from torch import nn
from transformers import AttentionInterface, BartConfig, BartForConditionalGeneration, BartModel
from transformers.models.bart.modeling_bart import BartAttention, eager_attention_forward


class UptrainBartConfig(BartConfig):
    """Configure a BART whose decoder has `num_key_value_heads` key/value heads; None means one a query head."""

    model_type = "uptrain_bart"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # save_pretrained names only the saved class here; AutoModel looks for itself.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "modeling_uptrain_bart.UptrainBartConfig",
                "AutoModel": "modeling_uptrain_bart.UptrainBartModel",
                "AutoModelForSeq2SeqLM": "modeling_uptrain_bart.UptrainBartForConditionalGeneration",
            },
        )
        super().__post_init__(**kwargs)
        heads: Any = self.decoder_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.num_key_value_heads < 1 or heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide decoder_attention_heads {heads}."
            )


def repeated_heads_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Attend as BART's eager kernel does, keys and values (batch, G, tokens, dim) repeated for H query heads."""
    key, value = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value))
    return eager_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register("uptrain_bart_eager", repeated_heads_forward)


class Kernel:
    """Stand for a config, but for "eager" name our own kernel: BART's knows no shared heads, all others do."""

    def __init__(self, config: BartConfig) -> None:
        self.source = config

    @property
    def _attn_implementation(self) -> str:
        name = str(self.source._attn_implementation)
        return "uptrain_bart_eager" if name == "eager" else name

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # while a copy is made, which has none yet
            raise AttributeError(name)
        return getattr(self.source, name)


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
        self.config = Kernel(config)  # type: ignore[assignment]


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


# save_pretrained then copies this file beside the weights.
UptrainBartConfig.register_for_auto_class()
UptrainBartModel.register_for_auto_class("AutoModel")
UptrainBartForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
