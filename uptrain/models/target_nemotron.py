"""The stock `nemotron` class as a target for families with LayerNorms and the MLP after attention. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from uptrain.architectures.decoders import FAMILIES
from uptrain.models.target import TargetClass

NEMOTRON_TARGETS: Mapping[str, TargetClass] = MappingProxyType(
    {
        "nemotron_of_gpt_neox": TargetClass(
            FAMILIES["nemotron"],
            # hidden_dropout goes: this class drops nothing between layers.
            config_names={"layer_norm_eps": "norm_eps"},
            fill={
                "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64,
                "vocab_size": 50432, "max_position_embeddings": 2048, "hidden_act": "gelu", "attention_bias": True,
                "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 2,
            },
            fix={"mlp_bias": True},
            drop=(
                "head_dim", "use_parallel_residual", "is_decoder", "classifier_dropout", "hidden_dropout",
            ),
            rotary=True,
            older_ropes=("default",),
            renames={
                "embed_in": "embed_tokens", "final_layer_norm": "norm", "embed_out": "lm_head",
                "mlp.dense_h_to_4h": "mlp.up_proj", "mlp.dense_4h_to_h": "mlp.down_proj",
            },
            purposes=("Model", "ForSequenceClassification"),
            shifts={"input_layernorm": -1.0, "post_attention_layernorm": -1.0, "final_layer_norm": -1.0},
        )
    }
)  # fmt: skip
