"""The stock `phi` class as a target for families whose attention and MLP read the same input. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from uptrain.architectures.decoders import PHI
from uptrain.models.target import TargetClass

_GPTJ = TargetClass(
    PHI,
    config_names={
        "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
        "activation_function": "hidden_act", "layer_norm_epsilon": "layer_norm_eps", "attn_pdrop": "attention_dropout",
    },
    fill={
        "hidden_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 16, "vocab_size": 50400,
        "bos_token_id": 50256, "eos_token_id": 50256,
    },
    multiples={"intermediate_size": ("hidden_size", 4)},
    fix={"qk_layernorm": False},
    drop=("rotary", "rotary_dim", "n_ctx", "scale_attn_weights", "head_dim"),
    rotary=True,
    renames={
        "wte": "embed_tokens", "h": "layers", "ln_1": "input_layernorm", "ln_f": "final_layernorm",
        "mlp.fc_in": "mlp.fc1", "mlp.fc_out": "mlp.fc2",
    },
    zeros=("lm_head.bias",),
    purposes=("Model", "ForSequenceClassification"),
    biased=True,
)  # fmt: skip

_GPT_NEOX = TargetClass(
    PHI,
    requires={"use_parallel_residual": True},
    config_names={"hidden_dropout": "resid_pdrop"},
    fill={
        "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64,
        "vocab_size": 50432, "hidden_act": "gelu", "bos_token_id": 0, "eos_token_id": 2,
    },
    fix={"qk_layernorm": False},
    drop=(
        "head_dim", "use_parallel_residual", "attention_bias", "is_decoder", "classifier_dropout",
    ),
    rotary=True,
    renames={
        "embed_in": "embed_tokens", "final_layer_norm": "final_layernorm", "embed_out": "lm_head",
        "mlp.dense_h_to_4h": "mlp.fc1", "mlp.dense_4h_to_h": "mlp.fc2",
    },
    attention_norm="input_layernorm",
    folds={"mlp.dense_h_to_4h": "post_attention_layernorm"},
    zeros=("lm_head.bias",),
    purposes=("Model", "ForSequenceClassification"),
    biased=True,
)  # fmt: skip

PHI_TARGETS: Mapping[str, TargetClass] = MappingProxyType({"phi_of_gpt_neox": _GPT_NEOX, "phi_of_gptj": _GPTJ})
