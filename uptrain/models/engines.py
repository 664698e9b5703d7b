"""Which classes engines other than transformers can't load: the one place that hints and model cards ask. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from uptrain.architectures.description import auto_class_name
from uptrain.architectures.model_class import is_language_model
from uptrain.architectures.schema import Family
from uptrain.architectures.wrappers import WRAPPERS

_OWN_ATTENTION = "its attention is code of its own, which vLLM's backend for transformers can't replace"
_LATENT = "vLLM has no class for this latent"

VLLM_LOADS_NOT: Mapping[str, str] = MappingProxyType(
    {
        "uptrain_bloom": _OWN_ATTENTION,
        "uptrain_mpt": _OWN_ATTENTION,
        "uptrain_gpt_neo": _OWN_ATTENTION,
        "gpt_neo": _OWN_ATTENTION,
        "uptrain_gpt2_mla": _LATENT,
        "uptrain_llama_mla": _LATENT,
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
    if rope == "longrope":
        return "vLLM can't express its rotary table"
    return ""
