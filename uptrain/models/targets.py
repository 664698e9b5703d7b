"""Which class holds a result: one entry per target class, tried in the order the family names them. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from uptrain.architectures.decoders import GPT_BIGCODE, UPTRAIN_GPT2, UPTRAIN_GPT2_MLA, UPTRAIN_LLAMA_MLA
from uptrain.architectures.description import ModelDescription
from uptrain.architectures.encoder_decoders import UPTRAIN_BART, UPTRAIN_T5, UPTRAIN_UMT5, UPTRAIN_WHISPER
from uptrain.architectures.mha_only import UPTRAIN_BLOOM, UPTRAIN_GPT_NEO, UPTRAIN_MPT, UPTRAIN_OPT, UPTRAIN_PERSIMMON
from uptrain.architectures.model_class import class_named, is_language_model, stem
from uptrain.architectures.own_classes import OWN_CLASSES
from uptrain.architectures.schema import Family
from uptrain.checkpoint.weight_files import EXPLICIT
from uptrain.errors import UsageError
from uptrain.models.target import TargetClass
from uptrain.models.target_nemotron import NEMOTRON_TARGETS
from uptrain.models.target_phi import PHI_TARGETS

OF_THE_FOLDER = ("auto_map", EXPLICIT)
"""Config keys that name code or weight files in the source's own folder."""


def _ours(family: Family, **changes: Any) -> TargetClass:
    """Return a target class of ours, whose modelling file goes into the checkpoint."""
    own = OWN_CLASSES[family.model_type]
    return TargetClass(family, remote_code=f"{own.module}.py", auto_classes=own.auto_classes, **changes)


TARGET_CLASSES: Mapping[str, TargetClass] = MappingProxyType(
    {
        **PHI_TARGETS,
        **NEMOTRON_TARGETS,
        "gpt_bigcode": TargetClass(
            GPT_BIGCODE,
            requires={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
            fill={"activation_function": "gelu_new"},
            drop=("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "num_key_value_heads"),
            transposes=("mlp.c_fc", "mlp.c_proj"),
            purposes=("Model", "ForSequenceClassification", "ForTokenClassification"),
        ),
        "uptrain_llama_mla": _ours(
            UPTRAIN_LLAMA_MLA,
            fill={"rms_norm_eps": 1e-6},
            drop=("head_dim", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        ),
        "uptrain_gpt2_mla": _ours(UPTRAIN_GPT2_MLA, drop=("num_key_value_heads",)),
        "uptrain_gpt2": _ours(UPTRAIN_GPT2),
        "uptrain_bloom": _ours(UPTRAIN_BLOOM),
        "uptrain_gpt_neo": _ours(UPTRAIN_GPT_NEO),
        "uptrain_mpt": _ours(UPTRAIN_MPT),
        "uptrain_bart": _ours(UPTRAIN_BART),
        "uptrain_umt5": _ours(UPTRAIN_UMT5),
        "uptrain_whisper": _ours(UPTRAIN_WHISPER),
        "uptrain_t5": _ours(UPTRAIN_T5),
        # mT5 is T5 v1.1 with other defaults, and never scales its decoder's output, which T5 does where it ties.
        "uptrain_t5_of_mt5": _ours(
            UPTRAIN_T5,
            fill={
                "num_layers": 8,
                "num_heads": 6,
                "d_ff": 1024,
                "vocab_size": 250112,
                "feed_forward_proj": "gated-gelu",
                "decoder_start_token_id": 0,
            },
            fix={"tie_word_embeddings": False},
        ),
        "uptrain_opt": _ours(UPTRAIN_OPT),
        "uptrain_persimmon": _ours(UPTRAIN_PERSIMMON),
    }
)


def choose_target(source: ModelDescription, kind: str, same: bool) -> TargetClass:
    """Return the first target class that holds a result exactly, else the source's own class.

    - `source`: what the source's config says.
    - `kind`: "gqa" or "mqa".
    - `same`: the result has as many key/value heads as the source.
    """
    for name in source.family.targets.get(kind, ()):
        target = TARGET_CLASSES[name]
        if not same and all(source.config.get(key, value) == value for key, value in target.requires.items()):
            return target
    return own_target(source.family)


def own_target(family: Family) -> TargetClass:
    """Return the family's own class as a target class, with its modelling file where the class is uptrain's."""
    known = TARGET_CLASSES.get(family.model_type)
    if known is None or known.family is not family or not known.remote_code:
        return TargetClass(family)
    return TargetClass(family, remote_code=known.remote_code, auto_classes=known.auto_classes)


def result_class(target: TargetClass, source: ModelDescription) -> str:
    """Return the class that a result's config.json names: the target's, for the same purpose as the source's class.

    `target` is the class that holds the result as a language model.

    Raises:
        UsageError: the target class has no class for that purpose.
    """
    named = class_named(source.config)
    if named is None or is_language_model(source.config):
        return target.family.class_name
    if target.family is source.family:
        return named
    purpose = named.removeprefix(stem(source.family.class_name))
    if purpose not in target.purposes:
        raise UsageError(
            f"{source.name} is a {named}, and {target.name}, which would hold the result, has no such class.",
            "Use another --to, for which its own family has a class.",
        )
    return stem(target.family.class_name) + purpose


def target_config(target: TargetClass, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source's config rewritten for `target`, its attention sizes still the source's."""
    kept = {key: value for key, value in source.items() if key not in (*target.drop, *OF_THE_FOLDER)}
    config = {target.config_names.get(key, key): value for key, value in kept.items()}
    for key, value in target.fill.items():
        config.setdefault(key, value)
    for key, (other, factor) in target.multiples.items():
        if config.get(key) is None:
            config[key] = factor * config[other]
    config.update(target.fix)
    config["model_type"] = target.name
    config["architectures"] = [target.family.class_name]  # a language model's; see `result_class`
    if target.remote_code:
        module = target.remote_code.removesuffix(".py")
        config["auto_map"] = {auto: f"{module}.{name}" for auto, name in target.auto_classes.items()}
    return config
