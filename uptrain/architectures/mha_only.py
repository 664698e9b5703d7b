"""The families whose config has no number of key/value heads, and our own classes for their results. Data only."""

from __future__ import annotations

from uptrain.architectures.own_classes import OWN_CLASSES
from uptrain.architectures.schema import (
    ConfigKeys,
    Family,
    KeyNorm,
    Packing,
    PoolOnly,
    Position,
    Projections,
    RopeSettings,
    Vocabulary,
)

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
CLIPPED = PoolOnly("it clips queries, keys and values, which no longer cancels when heads are re-scaled")

GPT_NEOX = Family(
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    layer="{prefix}layers.{layer}.attention.",
    prefixes=("gpt_neox.", ""),
    projections=Projections(o="dense", fused="query_key_value", packing=Packing.GROUPED),
    keys=ConfigKeys(num_key_value_heads=None, head_dim=None, rotary_share="rotary_pct"),
    partial_rotary_factor=0.25,
    vocabulary=Vocabulary("embed_in.weight", ("lm_head.weight", "embed_out.weight")),
    rotary=RopeSettings(theta_key="rotary_emb_base", partly=True),
    buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    defaults=dict(zip(_SIZES, (6144, 44, 64, 50432, 2048), strict=True)),
    targets=dict.fromkeys(("gqa", "mqa"), ("phi_of_gpt_neox", "nemotron_of_gpt_neox")),
    native=False,
)

GPTJ = Family(
    model_type="gptj",
    class_name="GPTJForCausalLM",
    layer="{prefix}h.{layer}.attn.",
    prefixes=("transformer.", ""),
    projections=Projections(o="out_proj"),
    keys=ConfigKeys(
        "n_embd", "n_layer", "n_head", None, None, rotary_ndims="rotary_dim", max_position_embeddings="n_positions"
    ),
    position=Position.ROTARY_INTERLEAVED,
    vocabulary=Vocabulary("wte.weight"),
    buffers=("attn.bias", "attn.masked_bias", "attn.causal_mask", "attn.embed_positions"),
    defaults={
        "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "vocab_size": 50400, "rotary_dim": 64,
    },
    targets={"gqa": ("phi_of_gptj",), "mqa": ("phi_of_gptj",)},
    native=False,
)  # fmt: skip

CODEGEN = GPTJ.for_model(
    "codegen",
    "CodeGenForCausalLM",
    projections=Projections(o="out_proj", fused="qkv_proj", packing=Packing.BLOCKS),
)

OPT = Family(
    model_type="opt",
    class_name="OPTForCausalLM",
    layer="{prefix}decoder.layers.{layer}.self_attn.",
    prefixes=("model.", ""),
    projections=Projections(o="out_proj"),
    keys=ConfigKeys(num_key_value_heads=None, head_dim=None),
    position=Position.ABSOLUTE,
    vocabulary=Vocabulary("decoder.embed_tokens.weight", tied=True),
    buffers=(),
    defaults=dict(zip(_SIZES, (768, 12, 12, 50272, 2048), strict=True)),
    targets={"gqa": ("uptrain_opt",), "mqa": ("uptrain_opt",)},
    native=False,
)

BLOOM = Family(
    model_type="bloom",
    class_name="BloomForCausalLM",
    layer="{prefix}h.{layer}.self_attention.",
    prefixes=("transformer.", ""),
    projections=Projections(o="dense", fused="query_key_value", packing=Packing.GROUPED),
    keys=ConfigKeys("hidden_size", "n_layer", "n_head", None, None, max_position_embeddings="seq_length"),
    position=Position.ALIBI,
    vocabulary=Vocabulary("word_embeddings.weight", tied=True),
    buffers=(),
    defaults={"hidden_size": 64, "n_layer": 2, "n_head": 8, "vocab_size": 250880},
    older={"hidden_size": "n_embed", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
    targets={"gqa": ("uptrain_bloom",), "mqa": ("uptrain_bloom",)},
    unsupported={"slow_but_exact": (True, "it adds slices of its output one by one")},
    native=False,
)

GPT_NEO = Family(
    model_type="gpt_neo",
    class_name="GPTNeoForCausalLM",
    layer="{prefix}h.{layer}.attn.attention.",
    prefixes=("transformer.", ""),
    projections=Projections(o="out_proj"),
    keys=ConfigKeys("hidden_size", "num_layers", "num_heads", None, None),
    position=Position.ABSOLUTE,
    vocabulary=Vocabulary("wte.weight", tied=True),
    buffers=("attn.attention.bias", "attn.attention.masked_bias"),
    defaults={
        "hidden_size": 2048, "num_layers": 24, "num_heads": 16, "vocab_size": 50257, "max_position_embeddings": 2048,
    },
    older={"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"},
    targets={"gqa": ("uptrain_gpt_neo",), "mqa": ("uptrain_gpt_neo",)},
    native=False,
)  # fmt: skip

MPT = Family(
    model_type="mpt",
    class_name="MptForCausalLM",
    layer="{prefix}blocks.{layer}.attn.",
    prefixes=("transformer.", ""),
    projections=Projections(o="out_proj", fused="Wqkv", packing=Packing.CONCAT),
    keys=ConfigKeys("d_model", "n_layers", "n_heads", None, None, max_position_embeddings="max_seq_len"),
    position=Position.ALIBI,
    vocabulary=Vocabulary("wte.weight", tied=True),
    buffers=(),
    defaults={"d_model": 2048, "n_layers": 24, "n_heads": 16, "max_seq_len": 2048, "vocab_size": 50368},
    targets={"gqa": ("uptrain_mpt",), "mqa": ("uptrain_mpt",)},
    unsupported={
        "attn_config.qk_ln": (True, "transformers' class leaves its norms on queries and keys out"),
        "attn_config.alibi": (False, "transformers' class adds ALiBi all the same"),
        "attn_config.prefix_lm": (True, "transformers' class reads every token from the left only"),
    },
    pool_only={"attn_config.clip_qkv": CLIPPED},
    native=False,
)

PERSIMMON = Family(
    model_type="persimmon",
    class_name="PersimmonForCausalLM",
    projections=Projections(o="dense", fused="query_key_value", packing=Packing.GROUPED),
    keys=ConfigKeys(num_key_value_heads=None, head_dim=None),
    partial_rotary_factor=0.5,
    rotary=RopeSettings(partly=True),
    key_norm=KeyNorm("k_layernorm", "qk_layernorm"),
    defaults={**dict(zip(_SIZES, (4096, 36, 64, 262144, 16384), strict=True)), "qk_layernorm": True},
    targets={"gqa": ("uptrain_persimmon",), "mqa": ("uptrain_persimmon",)},
    native=False,
)

UPTRAIN_BLOOM = BLOOM.with_groups(OWN_CLASSES["uptrain_bloom"])
UPTRAIN_GPT_NEO = GPT_NEO.with_groups(OWN_CLASSES["uptrain_gpt_neo"])
UPTRAIN_MPT = MPT.with_groups(OWN_CLASSES["uptrain_mpt"])
UPTRAIN_OPT = OPT.with_groups(OWN_CLASSES["uptrain_opt"])
UPTRAIN_PERSIMMON = PERSIMMON.with_groups(OWN_CLASSES["uptrain_persimmon"])

MHA_ONLY = (
    BLOOM, UPTRAIN_BLOOM, CODEGEN, GPT_NEO, UPTRAIN_GPT_NEO, GPT_NEOX, GPTJ, MPT, UPTRAIN_MPT, OPT, UPTRAIN_OPT,
    PERSIMMON, UPTRAIN_PERSIMMON,
)  # fmt: skip
