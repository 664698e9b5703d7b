"""Which classes engines other than transformers can't load: the one place that hints and model cards ask. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from uptrain.architectures.description import auto_class_name
from uptrain.architectures.mla_rope import MLARope
from uptrain.architectures.model_class import is_language_model
from uptrain.architectures.own_classes import OWN_CLASSES
from uptrain.architectures.schema import Family
from uptrain.architectures.wrappers import WRAPPERS

VLLM_LOADS_NOT: Mapping[str, str] = MappingProxyType(
    {
        **{name: own.not_in_vllm for name, own in OWN_CLASSES.items() if own.not_in_vllm},
        "gpt_neo": OWN_CLASSES["uptrain_gpt_neo"].not_in_vllm,
    }
)
"""By model_type, why vLLM can't load it; `benchmarks/engines.py --families` asks vLLM itself (docs/targets.md)."""


def why_not_vllm(config: Mapping[str, Any], rope: str | None = None) -> str:
    """Return why vLLM can't load a model of this config, empty where it can; `rope` is how a latent keeps positions."""
    if why := VLLM_LOADS_NOT.get(str(config.get("model_type"))):
        return why
    if str(config.get("model_type")) in WRAPPERS:
        return "vLLM has not been tried with such a wrapper yet"
    if auto_class_name(config) != Family.auto_class:
        return "vLLM has no class for this decoder, which reads an encoder"
    if not is_language_model(config):
        return "it has no language-model head"
    found = MLARope.named(rope)
    if found is not None and found.chooses_pairs:
        return "vLLM can't express its rotary table"
    return ""
