# Copyright 2026 The uptrain authors. Licensed under the Apache License, Version 2.0.
"""UMT5 whose decoder's query heads share key/value heads (GQA, MQA): over its own text, and the encoder's output.

One self-contained file: it is copied into converted checkpoints, where `trust_remote_code=True` loads it
without uptrain. Apart from the decoder's `k` and `v`, which are narrower, every tensor has UMT5's name, shape and
bytes.
"""

from typing import Any

import torch
import transformers

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(f"This model's class needs transformers 5 or newer; here is {transformers.__version__}.")

from torch import nn
from transformers import AttentionInterface, UMT5Config, UMT5ForConditionalGeneration, UMT5Model
from transformers.models.t5.modeling_t5 import T5Attention, eager_attention_forward


class UptrainUMT5Config(UMT5Config):
    """Configure a UMT5 whose decoder has `num_key_value_heads` key/value heads; none given means one per query head."""

    model_type = "uptrain_umt5"

    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # save_pretrained names only the saved class here; AutoModel looks for itself.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "modeling_uptrain_umt5.UptrainUMT5Config",
                "AutoModel": "modeling_uptrain_umt5.UptrainUMT5Model",
                "AutoModelForSeq2SeqLM": "modeling_uptrain_umt5.UptrainUMT5ForConditionalGeneration",
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


AttentionInterface.register("uptrain_umt5_eager", repeated_heads_forward)


class Kernel:
    """Name the kernel that a config asks for, with ours for "eager": T5's own knows no shared heads, all others do."""

    def __init__(self, config: UMT5Config) -> None:
        self._config = config

    @property
    def _attn_implementation(self) -> str:
        name = str(self._config._attn_implementation)
        return "uptrain_umt5_eager" if name == "eager" else name


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
        self.config = Kernel(config)  # type: ignore[assignment]

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


# save_pretrained then copies this file beside the weights.
UptrainUMT5Config.register_for_auto_class()
UptrainUMT5Model.register_for_auto_class("AutoModel")
UptrainUMT5ForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
