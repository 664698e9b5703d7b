"""Which class holds a result: one frozen entry a host, tried in the order the family names them. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from uptrain.architectures.decoders import GPT_BIGCODE, UPTRAIN_GPT2, UPTRAIN_GPT2_MLA, UPTRAIN_LLAMA_MLA
from uptrain.architectures.description import ModelDescription
from uptrain.architectures.encoder_decoders import UPTRAIN_BART, UPTRAIN_T5, UPTRAIN_UMT5, UPTRAIN_WHISPER
from uptrain.architectures.mha_only import UPTRAIN_BLOOM, UPTRAIN_GPT_NEO, UPTRAIN_MPT, UPTRAIN_OPT, UPTRAIN_PERSIMMON
from uptrain.architectures.model_class import class_named, is_language_model, stem
from uptrain.architectures.schema import Architecture
from uptrain.checkpoint.weight_files import EXPLICIT
from uptrain.errors import UsageError
from uptrain.models.target import Host
from uptrain.models.target_nemotron import NEMOTRON_HOSTS
from uptrain.models.target_phi import PHI_HOSTS

OF_THE_FOLDER = ("auto_map", EXPLICIT)
"""Config keys that name code or weight files of the source's own folder."""


def _ours(architecture: Architecture, config: str, model: str, **changes: Any) -> Host:
    """Return a host whose modelling file, with these classes, ships inside the checkpoint."""
    return Host(
        architecture,
        remote_code=f"modeling_{architecture.model_type}.py",
        auto_classes={"AutoConfig": config, "AutoModel": model, architecture.auto_class: architecture.class_name},
        **changes,
    )


HOSTS: Mapping[str, Host] = MappingProxyType(
    {
        **PHI_HOSTS,
        **NEMOTRON_HOSTS,
        "gpt_bigcode": Host(
            GPT_BIGCODE,
            requires={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
            fill={"activation_function": "gelu_new"},
            drop=("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "num_key_value_heads"),
            transposes=("mlp.c_fc", "mlp.c_proj"),
            purposes=("Model", "ForSequenceClassification", "ForTokenClassification"),
        ),
        "uptrain_llama_mla": _ours(
            UPTRAIN_LLAMA_MLA,
            "UptrainLlamaMLAConfig",
            "UptrainLlamaMLAModel",
            fill={"rms_norm_eps": 1e-6},
            drop=("head_dim", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
        ),
        "uptrain_gpt2_mla": _ours(
            UPTRAIN_GPT2_MLA, "UptrainGPT2MLAConfig", "UptrainGPT2MLAModel", drop=("num_key_value_heads",)
        ),
        "uptrain_gpt2": _ours(UPTRAIN_GPT2, "UptrainGPT2Config", "UptrainGPT2Model"),
        "uptrain_bloom": _ours(UPTRAIN_BLOOM, "UptrainBloomConfig", "UptrainBloomModel"),
        "uptrain_gpt_neo": _ours(UPTRAIN_GPT_NEO, "UptrainGPTNeoConfig", "UptrainGPTNeoModel"),
        "uptrain_mpt": _ours(UPTRAIN_MPT, "UptrainMptConfig", "UptrainMptModel"),
        "uptrain_bart": _ours(UPTRAIN_BART, "UptrainBartConfig", "UptrainBartModel"),
        "uptrain_umt5": _ours(UPTRAIN_UMT5, "UptrainUMT5Config", "UptrainUMT5Model"),
        "uptrain_whisper": _ours(UPTRAIN_WHISPER, "UptrainWhisperConfig", "UptrainWhisperModel"),
        "uptrain_t5": _ours(UPTRAIN_T5, "UptrainT5Config", "UptrainT5Model"),
        # mT5 is T5 v1.1 with other defaults, and never scales its decoder's output, which T5 does where it ties.
        "uptrain_t5_of_mt5": _ours(
            UPTRAIN_T5,
            "UptrainT5Config",
            "UptrainT5Model",
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
        "uptrain_opt": _ours(UPTRAIN_OPT, "UptrainOPTConfig", "UptrainOPTModel"),
        "uptrain_persimmon": _ours(UPTRAIN_PERSIMMON, "UptrainPersimmonConfig", "UptrainPersimmonModel"),
    }
)


def host_of(source: ModelDescription, target: str, same: bool) -> Host:
    """Return the first host that holds `target` exactly for this source; the source's own class where it can.

    `same` says that the result has as many key/value heads as the source.
    """
    for name in source.family.hosts.get(target, ()):
        host = HOSTS[name]
        if not same and all(source.config.get(key, value) == value for key, value in host.requires.items()):
            return host
    return own_host(source.family)


def own_host(architecture: Architecture) -> Host:
    """Return the family's own class as a host, with its modelling file where that is ours."""
    known = HOSTS.get(architecture.model_type)
    if known is None or known.architecture is not architecture or not known.remote_code:
        return Host(architecture)
    return Host(architecture, remote_code=known.remote_code, auto_classes=known.auto_classes)


def result_class(host: Host, source: ModelDescription) -> str:
    """Return the class that a result's config.json names: the host's, for the same purpose as the source's class.

    `host` is the class that holds the result as a language model.

    Raises:
        UsageError: the host has no class for that purpose.
    """
    named = class_named(source.config)
    if named is None or is_language_model(source.config):
        return host.architecture.class_name
    if host.architecture is source.family:
        return named
    purpose = named.removeprefix(stem(source.family.class_name))
    if purpose not in host.purposes:
        raise UsageError(
            f"{source.name} is a {named}, and {host.name}, which would hold the result, has no such class.",
            "Use another --to, for which its own family has a class.",
        )
    return stem(host.architecture.class_name) + purpose


def host_config(host: Host, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source's config rewritten for `host`, its attention sizes still the source's."""
    kept = {key: value for key, value in source.items() if key not in (*host.drop, *OF_THE_FOLDER)}
    config = {host.config_names.get(key, key): value for key, value in kept.items()}
    for key, value in host.fill.items():
        config.setdefault(key, value)
    for key, (other, factor) in host.multiples.items():
        if config.get(key) is None:
            config[key] = factor * config[other]
    config.update(host.fix)
    config["model_type"] = host.name
    config["architectures"] = [host.architecture.class_name]  # a language model's; see `result_class`
    if host.remote_code:
        module = host.remote_code.removesuffix(".py")
        config["auto_map"] = {auto: f"{module}.{name}" for auto, name in host.auto_classes.items()}
    return config
