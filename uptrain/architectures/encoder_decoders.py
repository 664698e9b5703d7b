"""The families whose decoder reads an encoder, and our own classes for their results. Data only.

Both attentions of a decoder layer share heads. The encoder has no cache and stays as it is.

Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models", section 3.1.
"""

from __future__ import annotations

from dataclasses import replace

from uptrain.architectures.own_classes import OWN_CLASSES
from uptrain.architectures.schema import ConfigKeys, Family, Position, Projections, Vocabulary

_UNCALIBRATED = "its decoder reads an encoder's output, and calibration runs one stack of layers on text"
_ALONE = "it is an encoder or a decoder alone, and only both together are known"
_SEQ2SEQ = "AutoModelForSeq2SeqLM"

T5 = Family(
    model_type="t5",
    class_name="T5ForConditionalGeneration",
    layer="{prefix}decoder.block.{layer}.layer.0.SelfAttention.",
    cross="{prefix}decoder.block.{layer}.layer.1.EncDecAttention.",
    auto_class=_SEQ2SEQ,
    prefixes=("",),
    projections=Projections("q", "k", "v", "o"),
    keys=ConfigKeys(
        "d_model", "num_decoder_layers", "num_heads", None, "d_kv",
        initializer_factor="initializer_factor",
    ),
    position=Position.RELATIVE,
    vocabulary=Vocabulary("shared.weight", tied=True, always=True, more=True),
    buffers=(),
    defaults={
        "d_model": 512, "num_decoder_layers": 6, "num_heads": 8, "d_kv": 64, "vocab_size": 32128,
        "initializer_factor": 1.0,
    },
    older={"num_decoder_layers": "num_layers"},
    targets={"gqa": ("uptrain_t5",), "mqa": ("uptrain_t5",)},
    unsupported={"is_encoder_decoder": (False, _ALONE)},
    uncalibrated=_UNCALIBRATED,
    native=False,
)  # fmt: skip

MT5 = T5.for_model(
    "mt5",
    "MT5ForConditionalGeneration",
    defaults={**T5.defaults, "num_decoder_layers": 8, "num_heads": 6, "vocab_size": 250112},
    targets={"gqa": ("uptrain_t5_of_mt5",), "mqa": ("uptrain_t5_of_mt5",)},
)

UMT5 = T5.for_model(
    "umt5",
    "UMT5ForConditionalGeneration",
    defaults=MT5.defaults,
    targets={"gqa": ("uptrain_umt5",), "mqa": ("uptrain_umt5",)},
)

BART = Family(
    model_type="bart",
    class_name="BartForConditionalGeneration",
    layer="{prefix}decoder.layers.{layer}.self_attn.",
    cross="{prefix}decoder.layers.{layer}.encoder_attn.",
    auto_class=_SEQ2SEQ,
    projections=Projections(o="out_proj"),
    keys=ConfigKeys(
        "d_model", "decoder_layers", "decoder_attention_heads", None, None, initializer_range="init_std"
    ),
    position=Position.ABSOLUTE,
    vocabulary=Vocabulary("shared.weight", tied=True, more=True),
    buffers=(),
    defaults={
        "d_model": 1024, "decoder_layers": 12, "decoder_attention_heads": 16, "vocab_size": 50265,
        "max_position_embeddings": 1024,
    },
    targets={"gqa": ("uptrain_bart",), "mqa": ("uptrain_bart",)},
    unsupported={"is_encoder_decoder": (False, _ALONE)},
    uncalibrated=_UNCALIBRATED,
    native=False,
)  # fmt: skip

WHISPER = BART.for_model(
    "whisper",
    "WhisperForConditionalGeneration",
    auto_class="AutoModelForSpeechSeq2Seq",
    keys=replace(BART.keys, max_position_embeddings="max_target_positions"),
    vocabulary=Vocabulary("decoder.embed_tokens.weight", ("proj_out.weight",), tied=True),
    defaults={
        "d_model": 384, "decoder_layers": 4, "decoder_attention_heads": 6, "vocab_size": 51865,
        "max_target_positions": 448,
    },
    targets={"gqa": ("uptrain_whisper",), "mqa": ("uptrain_whisper",)},
    # Word timestamps are read from what these heads attend to.
    head_indices={"alignment_heads": True},
)  # fmt: skip

UPTRAIN_BART = BART.with_groups(OWN_CLASSES["uptrain_bart"])
UPTRAIN_WHISPER = WHISPER.with_groups(OWN_CLASSES["uptrain_whisper"])
UPTRAIN_UMT5 = UMT5.with_groups(OWN_CLASSES["uptrain_umt5"])
UPTRAIN_T5 = T5.with_groups(OWN_CLASSES["uptrain_t5"])

ENCODER_DECODERS = (
    BART, UPTRAIN_BART, MT5, T5, UPTRAIN_T5, UMT5, UPTRAIN_UMT5, WHISPER, UPTRAIN_WHISPER,
)  # fmt: skip
