"""The table's families whose decoder reads an encoder, and our own classes for their results. Data only.

Both of a decoder layer's attentions share heads; the encoder, which keeps no cache, is left alone.

Source: Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models", section 3.1.
"""

from __future__ import annotations

from uptrain.layout import Architecture, ConfigKeys, Position, Projections

_UNCALIBRATED = "its decoder reads an encoder's output, and calibration runs one stack of layers on text"
_SEQ2SEQ = "AutoModelForSeq2SeqLM"

T5 = Architecture(
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
    buffers=(),
    defaults={
        "d_model": 512, "num_decoder_layers": 6, "num_heads": 8, "d_kv": 64, "vocab_size": 32128,
        "initializer_factor": 1.0,
    },
    older={"num_decoder_layers": "num_layers"},
    hosts={"gqa": ("uptrain_t5",), "mqa": ("uptrain_t5",)},
    uncalibrated=_UNCALIBRATED,
    native=False,
)  # fmt: skip

MT5 = T5.for_model(
    "mt5",
    "MT5ForConditionalGeneration",
    defaults={**T5.defaults, "num_decoder_layers": 8, "num_heads": 6, "vocab_size": 250112},
    hosts={"gqa": ("uptrain_t5_of_mt5",), "mqa": ("uptrain_t5_of_mt5",)},
)

UPTRAIN_T5 = T5.with_groups("uptrain_t5", "UptrainT5ForConditionalGeneration")

ENCODER_DECODERS = (MT5, T5, UPTRAIN_T5)
