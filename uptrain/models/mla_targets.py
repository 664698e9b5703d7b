"""Which class holds a latent: one entry per target class, tried in the order the family names them. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from uptrain.architectures.decoders import DEEPSEEK_V3
from uptrain.architectures.description import ModelDescription
from uptrain.architectures.mla_projections import MLASchema
from uptrain.architectures.mla_rope import MLARope
from uptrain.architectures.rope_parameters import WORDS
from uptrain.architectures.schema import Family
from uptrain.models.target import TargetClass
from uptrain.models.targets import TARGET_CLASSES, target_config

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class MLATargetClass:
    """A class that can hold a latent, and what a source needs for it.

    - `target`: the class, and how a source's checkpoint becomes one of its own.
    - `schema`: how it stores a latent layer.
    - `ropes`: where it can have the positions of keys.
    - `biased`: queries and the latent may have biases.
    - `refuses`: the values (None: any but null) of keys in the source's config that it can't hold.
    - `engines`: those that load it, with the `ropes` that each can run.
    - `keep`: the keys of the source's config to take over, None for all.
    - `dtypes`: safetensors' names of the dtypes in which it is exact.
    - `rms_norm_eps`: what the config must say for all engines to agree. The residual stream is scaled then.
    - `rescaled`: the modules whose output joins the residual stream, embeddings included.
    - `untied`: it gets a head of its own where the source's is tied to its embedding.
    """

    target: TargetClass
    schema: MLASchema
    ropes: tuple[MLARope, ...]
    biased: bool = True
    refuses: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _NOTHING)
    engines: Mapping[str, tuple[MLARope, ...]] = field(default_factory=lambda: _NOTHING)
    keep: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = ("F64", "F32", "F16", "BF16")
    rms_norm_eps: float | None = None
    rescaled: tuple[str, ...] = ()
    untied: bool = False

    @property
    def family(self) -> Family:
        """Return the target class's own family."""
        return self.target.family


_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "attention_dropout", "dtype", "torch_dtype", "transformers_version",
    "num_labels", "id2label", "label2id", "problem_type", "classifier_dropout",
)  # fmt: skip

MLA_TARGET_CLASSES: Mapping[str, MLATargetClass] = MappingProxyType(
    {
        "deepseek_v3": MLATargetClass(
            TargetClass(
                DEEPSEEK_V3,
                fill={"hidden_act": "silu", "tie_word_embeddings": False},
                # Every layer is dense; experts keep small valid numbers, because the class checks them all the same.
                fix={
                    "attention_bias": False, "rope_interleave": True, "q_lora_rank": None, "n_routed_experts": 8,
                    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                    "moe_intermediate_size": 64, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
                    "num_nextn_predict_layers": 0,
                },
                purposes=("Model", "ForSequenceClassification", "ForTokenClassification"),
            ),
            MLASchema(fold_scale=True, neutral=True),
            ropes=(MLARope.DECOUPLED, MLARope.LONGROPE),
            biased=False,
            refuses={"attention_bias": (True,), "mlp_bias": (True,)},
            # llama.cpp has no place for a table of frequencies in this family.
            engines={"any": (MLARope.DECOUPLED, MLARope.LONGROPE), "llama.cpp": (MLARope.DECOUPLED,)},
            keep=_KEPT,
            dtypes=("F64", "F32", "BF16"),
            rms_norm_eps=1e-6,
            rescaled=("embed_tokens", "mlp.down_proj"),
            # vLLM's class never ties its head: tied, it would compute nonsense there without a word.
            untied=True,
        ),
        "uptrain_llama_mla": MLATargetClass(
            TARGET_CLASSES["uptrain_llama_mla"],
            MLASchema(),
            ropes=(MLARope.DECOUPLED, MLARope.LONGROPE, MLARope.PRE_ROPE),
            engines={"any": (MLARope.DECOUPLED, MLARope.LONGROPE, MLARope.PRE_ROPE)},
        ),
        "uptrain_gpt2_mla": MLATargetClass(
            TARGET_CLASSES["uptrain_gpt2_mla"],
            MLASchema(output="c_proj", output_transposed=True),
            ropes=(MLARope.NONE,),
            engines={"any": (MLARope.NONE,)},
        ),
    }
)  # fmt: skip


def latent_config(entry: MLATargetClass, source: ModelDescription) -> dict[str, Any]:
    """Return the source's config rewritten for a MLA target class, its attention sizes and rotation not yet set.

    Where the source is silent, its own family's default is written: the target class's may be another.
    """
    said = {**source.family.defaults, **source.config}
    kept = said if entry.keep is None else {key: said[key] for key in entry.keep if key in said}
    config = target_config(entry.target, kept)
    for key in WORDS:
        config.pop(key, None)
    if entry.rms_norm_eps is not None:
        config["rms_norm_eps"] = entry.rms_norm_eps
    return config
