"""The table of families: one frozen entry per model family, which says where its attention is. Data only.

To add a family, add its entry here and go on as CONTRIBUTING.md says under "Add a model family".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from uptrain.architectures.encoder_decoders import ENCODER_DECODERS
from uptrain.architectures.mha_only import CLIPPED, MHA_ONLY
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
    Sliding,
    Vocabulary,
)

_NOTHING: Mapping[str, Any] = MappingProxyType({})

GPT2 = Family(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    layer="{prefix}h.{layer}.attn.",
    prefixes=("transformer.", ""),
    projections=Projections(o="c_proj", fused="c_attn", packing=Packing.CONCAT, transposed=True),
    keys=ConfigKeys("n_embd", "n_layer", "n_head", None, None, max_position_embeddings="n_positions"),
    position=Position.ABSOLUTE,
    vocabulary=Vocabulary("wte.weight", tied=True),
    buffers=("attn.bias", "attn.masked_bias"),
    defaults={"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    targets={"gqa": ("uptrain_gpt2",), "mqa": ("gpt_bigcode", "uptrain_gpt2"), "mla": ("uptrain_gpt2_mla",)},
    unsupported={"add_cross_attention": (True, "its cross-attention can't be converted yet")},
    native=False,
)

UPTRAIN_GPT2 = GPT2.for_own_class(
    OWN_CLASSES["uptrain_gpt2"],
    keys=replace(GPT2.keys, num_key_value_heads="num_key_value_heads"),
    targets={"mqa": ("gpt_bigcode", "uptrain_gpt2"), "mla": ("uptrain_gpt2_mla",)},
    native=True,
)

GPT_BIGCODE = GPT2.for_model(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    projections=replace(GPT2.projections, transposed=False),
    keys=replace(GPT2.keys, multi_query="multi_query"),
    defaults={**GPT2.defaults, "multi_query": True},
    targets={},
    unsupported={"multi_query": (False, "only the schema of its multi-query form is known")},
    native=True,
)

UPTRAIN_GPT2_MLA = GPT2.for_own_class(OWN_CLASSES["uptrain_gpt2_mla"], keys=replace(GPT2.keys, latent=True), targets={})

_PARTLY = RopeSettings(partly=True)

_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings",
    "num_key_value_heads", "head_dim",
)  # fmt: skip

LLAMA = Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    targets={"mla": ("deepseek_v3", "uptrain_llama_mla")},
    defaults={
        **dict(zip(_SIZES, (4096, 32, 32, 32000, 2048), strict=False)),
        "intermediate_size": 11008, "bos_token_id": 1, "eos_token_id": 2,
    },
)  # fmt: skip


_TIED = Vocabulary(tied=True)

_FUSED_EXPERTS = "transformers holds its experts in other tensors than the checkpoint, so no layer can be read alone"

_GATED = PoolOnly("its gates weigh each dim of a head, so the output can't absorb a factor", (True, "per-head"))
"""The exceptions are values of `gating` with which a gate multiplies a whole head."""

_BOTH_WAYS = {"use_bidirectional_attention": (True, "it reads a text both ways and keeps no cache")}


def _like_llama(
    model_type: str, class_name: str, *sizes: int, also: Mapping[str, Any] = _NOTHING, **changes: Any
) -> Family:
    """Return an entry with Llama's names; `sizes` are its class's defaults of `_SIZES`, `also` other defaults."""
    changes.setdefault("targets", _NOTHING)
    defaults = {**dict(zip(_SIZES, sizes, strict=False)), **also}
    return LLAMA.for_model(model_type, class_name, defaults=defaults, **changes)


UPTRAIN_LLAMA_MLA = LLAMA.for_own_class(
    OWN_CLASSES["uptrain_llama_mla"], keys=replace(LLAMA.keys, latent=True), targets={}
)

DEEPSEEK_V3 = LLAMA.for_model(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    keys=replace(LLAMA.keys, latent=True),
    position=Position.ROTARY_INTERLEAVED,
    defaults={
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "vocab_size": 129280,
        "max_position_embeddings": 4096,
    },
    targets={},
)

PHI = _like_llama(
    "phi", "PhiForCausalLM", 2048, 24, 32, 51200, 2048, partial_rotary_factor=0.5, rotary=_PARTLY,
    projections=Projections(o="dense"), key_norm=KeyNorm("k_layernorm", "qk_layernorm"),
)  # fmt: skip

FALCON = Family(
    model_type="falcon",
    class_name="FalconForCausalLM",
    layer="{prefix}h.{layer}.self_attention.",
    prefixes=("transformer.", ""),
    projections=Projections(o="dense", fused="query_key_value", packing=Packing.GROUPED),
    keys=ConfigKeys(
        num_key_value_heads="num_kv_heads", head_dim=None,
        multi_query="multi_query", grouped="new_decoder_architecture", alibi="alibi",
    ),
    vocabulary=Vocabulary("word_embeddings.weight", tied=True),
    buffers=("self_attention.rotary_emb.inv_freq",),
    defaults={
        **dict(zip(_SIZES, (4544, 32, 71, 65024, 2048), strict=False)),
        "multi_query": True, "new_decoder_architecture": False, "alibi": False,
    },
    expanded="new_decoder_architecture",
)  # fmt: skip

_ENTRIES = (
    *MHA_ONLY,
    *ENCODER_DECODERS,
    FALCON,
    GPT2,
    UPTRAIN_GPT2,
    UPTRAIN_GPT2_MLA,
    GPT_BIGCODE,
    LLAMA,
    UPTRAIN_LLAMA_MLA,
    DEEPSEEK_V3,
    _like_llama(
        "mistral", "MistralForCausalLM", 4096, 32, 32, 32000, 131072, 8, sliding=Sliding.ALL, targets=LLAMA.targets,
        also={"intermediate_size": 14336, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096},
    ),
    _like_llama(
        "qwen2", "Qwen2ForCausalLM", 4096, 32, 32, 151936, 32768, 32,
        sliding=Sliding.LAST, sliding_flag=True, targets={"mla": ("uptrain_llama_mla",)},
        also={"intermediate_size": 22016, "bos_token_id": None, "eos_token_id": None},
    ),
    _like_llama(
        "mixtral", "MixtralForCausalLM", 4096, 32, 32, 32000, 131072, 8,
        sliding=Sliding.ALL, uncalibrated=_FUSED_EXPERTS, rotary=RopeSettings(1_000_000.0),
    ),
    _like_llama(
        "qwen2_moe", "Qwen2MoeForCausalLM", 2048, 24, 16, 151936, 32768, 16,
        sliding=Sliding.EVEN, sliding_flag=True, uncalibrated=_FUSED_EXPERTS,
        also={"max_window_layers": 28},
    ),
    _like_llama(
        "gemma", "GemmaForCausalLM", 3072, 28, 16, 256000, 8192, 16, 256, vocabulary=_TIED, unsupported=_BOTH_WAYS
    ),
    _like_llama(
        "gemma2", "Gemma2ForCausalLM", 2304, 26, 8, 256000, 8192, 4, 256, vocabulary=_TIED,
        sliding=Sliding.PATTERN, also={"sliding_window": 4096}, unsupported=_BOTH_WAYS,
    ),
    _like_llama("granite", "GraniteForCausalLM", 4096, 32, 32, 32000, 2048),
    _like_llama(
        "olmo", "OlmoForCausalLM", 4096, 32, 32, 50304, 2048,
        pool_only={"clip_qkv": CLIPPED},
    ),
    _like_llama("arcee", "ArceeForCausalLM", 2560, 32, 32, 32000, 4096),
    _like_llama("jais2", "Jais2ForCausalLM", 3328, 32, 26, 150272, 8192),
    _like_llama("hyperclovax", "HyperCLOVAXForCausalLM", 4096, 32, 32, 32000, 2048),
    _like_llama("nanochat", "NanoChatForCausalLM", 768, 12, 6, 50304, 2048, key_norm=KeyNorm()),
    _like_llama(
        "vaultgemma", "VaultGemmaForCausalLM", 2304, 26, 8, 256000, 8192, 4, 256, vocabulary=_TIED,
        sliding=Sliding.PATTERN, also={"sliding_window": 4096},
    ),
    _like_llama(
        "smollm3", "SmolLM3ForCausalLM", 2048, 36, 16, 128256, 32768, 4, vocabulary=_TIED,
        sliding=Sliding.UNROTATED, sliding_flag=True, also={"no_rope_layer_interval": 4},
        rotary=RopeSettings(2_000_000.0),
    ),
    _like_llama(
        "starcoder2", "Starcoder2ForCausalLM", 3072, 30, 24, 49152, 4096, 2, vocabulary=_TIED, sliding=Sliding.ALL
    ),
    _like_llama(
        "cohere", "CohereForCausalLM", 8192, 40, 64, 256000, 8192, vocabulary=_TIED,
        position=Position.ROTARY_INTERLEAVED, rotary=RopeSettings(500_000.0),
        key_norm=KeyNorm(flag="use_qk_norm", by_head=True), also={"use_qk_norm": False},
    ),
    _like_llama(
        "qwen3", "Qwen3ForCausalLM", 4096, 32, 32, 151936, 32768, 32, 128,
        sliding=Sliding.LAST, sliding_flag=True, key_norm=KeyNorm(), also={"max_window_layers": 28},
    ),
    _like_llama(
        "qwen3_moe", "Qwen3MoeForCausalLM", 2048, 24, 32, 151936, 32768, 4,
        sliding=Sliding.ALL, sliding_flag=True, key_norm=KeyNorm(), uncalibrated=_FUSED_EXPERTS,
    ),
    _like_llama(
        "gemma3_text", "Gemma3ForCausalLM", 2304, 26, 8, 262208, 131072, 4, 256, vocabulary=_TIED,
        sliding=Sliding.PATTERN, sliding_window_pattern=6, key_norm=KeyNorm(), also={"sliding_window": 4096},
        unsupported=_BOTH_WAYS,
        rotary=RopeSettings(by_layer_type={
            "full_attention": ("rope_theta", 1_000_000.0), "sliding_attention": ("rope_local_base_freq", 10_000.0),
        }),
    ),
    _like_llama("olmo2", "Olmo2ForCausalLM", 4096, 32, 32, 50304, 2048, key_norm=KeyNorm(by_head=True)),
    _like_llama(
        "stablelm", "StableLmForCausalLM", 2560, 32, 32, 50304, 4096, 32, partial_rotary_factor=0.25, rotary=_PARTLY,
        key_norm=KeyNorm("k_layernorm.norms.{head}", "qk_layernorm", by_head=True),
    ),
    PHI,
    _like_llama(
        "phi3", "Phi3ForCausalLM", 3072, 32, 32, 32064, 4096, sliding=Sliding.ALL,
        rotary=RopeSettings(partly=True, renamed={"su": "longrope", "yarn": "longrope"}),
        also={"original_max_position_embeddings": 4096},
        projections=Projections(fused="qkv_proj", packing=Packing.CONCAT),
    ),
    _like_llama(
        "ministral", "MinistralForCausalLM", 4096, 32, 32, 32000, 131072, 8,
        sliding=Sliding.ALL, also={"sliding_window": 4096},
    ),
    _like_llama(
        "seed_oss", "SeedOssForCausalLM", 4096, 64, 80, 155136, 524288, 8, 128,
        targets={"mla": ("uptrain_llama_mla",)},
        also={"intermediate_size": 27648, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    ),
    _like_llama(
        "helium", "HeliumForCausalLM", 2560, 24, 20, 48000, 4096, 20, 128, position=Position.ROTARY_INTERLEAVED,
        rotary=RopeSettings(100_000.0),
    ),
    _like_llama(
        "ernie4_5", "Ernie4_5ForCausalLM", 1024, 18, 16, 103424, 131072, 2, 128, vocabulary=_TIED,
        position=Position.ROTARY_INTERLEAVED, rotary=RopeSettings(500_000.0),
    ),
    _like_llama(
        "glm", "GlmForCausalLM", 4096, 40, 32, 151552, 131072, 2, 128,
        position=Position.ROTARY_INTERLEAVED, partial_rotary_factor=0.5, rotary=_PARTLY,
    ),
    _like_llama(
        "glm4", "Glm4ForCausalLM", 4096, 40, 32, 151552, 131072, 2, 128,
        position=Position.ROTARY_INTERLEAVED, partial_rotary_factor=0.5, rotary=_PARTLY,
    ),
    _like_llama(
        "nemotron", "NemotronForCausalLM", 6144, 32, 48, 256000, 4096, partial_rotary_factor=0.5, rotary=_PARTLY
    ),
    _like_llama(
        "cohere2", "Cohere2ForCausalLM", 8192, 40, 64, 256000, 8192, vocabulary=_TIED,
        position=Position.ROTARY_INTERLEAVED, rotates_sliding_only=True,
        sliding=Sliding.PATTERN, sliding_window_pattern=4, also={"sliding_window": 4096},
    ),
    _like_llama(
        "olmo3", "Olmo3ForCausalLM", 4096, 32, 32, 50304, 2048, key_norm=KeyNorm(by_head=True),
        sliding=Sliding.PATTERN, sliding_window_pattern=4, also={"sliding_window": 4096},
        # What a config says of the base is for the layers that look back all the way; the others have their own.
        rotary=RopeSettings(by_layer_type={
            "full_attention": ("rope_theta", 500_000.0), "sliding_attention": ("", 500_000.0),
        }),
    ),
    _like_llama(
        "olmoe", "OlmoeForCausalLM", 2048, 16, 16, 50304, 4096,
        key_norm=KeyNorm(by_head=True), uncalibrated=_FUSED_EXPERTS, pool_only={"clip_qkv": CLIPPED},
    ),
    _like_llama(
        "granitemoe", "GraniteMoeForCausalLM", 4096, 32, 32, 32000, 2048, uncalibrated=_FUSED_EXPERTS
    ),
    _like_llama(
        "exaone4", "Exaone4ForCausalLM", 4096, 32, 32, 102400, 2048, 32, key_norm=KeyNorm(),
        sliding=Sliding.PATTERN, sliding_window_pattern=4, also={"sliding_window": 4096},
    ),
    _like_llama(
        "apertus", "ApertusForCausalLM", 4096, 32, 32, 131072, 65536, key_norm=KeyNorm(),
        rotary=RopeSettings(12_000_000.0, whole={
            "rope_type": "llama3", "rope_theta": 12_000_000.0, "factor": 8.0,
            "original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        }),
    ),
    _like_llama(
        "laguna", "LagunaForCausalLM", 2048, 40, 48, 100352, 131072, 8, 128,
        keys=ConfigKeys(attention_heads_by_layer="num_attention_heads_per_layer"), key_norm=KeyNorm(),
        also={"sliding_window": 512}, uncalibrated=_FUSED_EXPERTS,
        rotary=RopeSettings(
            partly=True, by_layer_type=dict.fromkeys(("full_attention", "sliding_attention"), ("rope_theta", None)),
            whole={
                "full_attention": {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
            },
        ),
        pool_only={"gating": _GATED},
        fixed_order="each query head has a gate of its own, which would have to move too",
    ),
    _like_llama(
        "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", 4096, 32, 32, 290943, 2048,
        key_norm=KeyNorm("key_layernorm"),
    ),
)  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType({entry.model_type: entry for entry in _ENTRIES})

NO_CACHE = frozenset(
    {
        "albert", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
        "esm", "eurobert", "funnel", "layoutlm", "longformer", "modernbert", "mpnet", "nomic_bert", "roberta",
        "roformer", "vit", "xlm-roberta",
    }
)  # fmt: skip
"""Encoder-only model types: they read a whole text at once and keep no key/value cache to shrink."""
