"""Explain a checkpoint of an unknown model type: a wrapper around other models, or a misspelt family."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.wrappers import WRAPPERS
from uptrain.errors import UsageError, did_you_mean

TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "language_model_config", "thinker_config", "decoder")
"""The sections in which wrappers' configs describe their language model, the most certain first."""
OTHER_SECTIONS = ("vision_config", "audio_config", "visual", "vision_tower_config", "speech_config")
"""Sections that only wrappers have. Some of those wrappers keep their language model's values outside any section."""
ALIKE = 0.85
"""The least similarity of a misspelt model type and the family that is meant, of at most 1."""


def refuse_unknown(config: Mapping[str, Any], where: str) -> UsageError:
    """Return the refusal of a config whose model_type is not in the table; `where` names the config."""
    model_type = config.get("model_type")
    wrapper = WRAPPERS.get(model_type) if isinstance(model_type, str) else None
    if wrapper is not None and not isinstance(config.get(wrapper.section), Mapping):
        return UsageError(
            f"{where} is a {model_type}, but its config.json has no {wrapper.section}, which would say what language "
            "model it wraps.",
            f"Let transformers write it out: AutoConfig.from_pretrained({where!r}).save_pretrained(…).",
        )
    if sections_of(config):
        return refuse_wrapper(config, where, "convert")
    known = ", ".join(sorted(FAMILIES))
    meant = _meant(str(model_type))
    return UsageError(
        f"{where} has model_type {model_type!r}, which uptrain doesn't know. It knows {known}.",
        f"{meant} CONTRIBUTING.md says how to add one.".strip(),
    )


def sections_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Map the sections of a wrapper's config that describe whole models to their model types, empty if not given.

    A config without such sections is not a wrapper's.
    """
    found = {}
    for key, section in config.items():
        if isinstance(section, Mapping) and (key in (*TEXT_SECTIONS, *OTHER_SECTIONS) or "model_type" in section):
            said = section.get("model_type")
            found[key] = said if isinstance(said, str) else ""
    return found


def refuse_wrapper(config: Mapping[str, Any], where: str, verb: str) -> UsageError:
    """Return the refusal of a wrapper's config, which names its language model.

    - `config`: the wrapper's config.
    - `where`: what the user called it.
    - `verb`: what can't be done with it.
    """
    model_type, wrapped = config.get("model_type"), sections_of(config)
    parts = ", ".join(f"{key} ({said})" if said else key for key, said in wrapped.items())
    tower = next((key for key in TEXT_SECTIONS if key in wrapped), "")
    family = wrapped.get(tower, "")
    if family in FAMILIES:
        hint = f"Its text tower is a {family}, a family that uptrain knows: name a checkpoint that holds it alone."
    elif family:
        hint = f"Its text tower is a {family}, a family that uptrain doesn't know either."
    else:
        hint = "Name a checkpoint that holds a language model alone."
    kind = "multimodal" if any(key in OTHER_SECTIONS for key in wrapped) else "composite"
    return UsageError(
        f"{where} is a {kind} {model_type}, which wraps {parts}. uptrain can't {verb} such a wrapper yet.", hint
    )


def _meant(model_type: str) -> str:
    """Return a question that names the family which a model type misspells; empty where it may be another model."""
    plain = {_plain(name): name for name in FAMILIES}
    same = plain.get(_plain(model_type))
    if same is not None:
        return f"Did you mean '{same}'?"
    others = _known_to_transformers()
    if not others or model_type in others:
        return ""
    near = difflib.get_close_matches(model_type, list(FAMILIES), n=1, cutoff=ALIKE)
    return did_you_mean(model_type, [name for name in near if _numbers(name) == _numbers(model_type)])


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _numbers(name: str) -> list[str]:
    # Another number is another generation of the family, not a typing error.
    return re.findall(r"\d+", name)


def _known_to_transformers() -> Collection[str]:
    """Return all quoted words of transformers' tables of models, without importing it; empty if it isn't installed."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    tables = (Path(spec.origin).parent / "models" / "auto").glob("*.py")
    return frozenset(word for table in tables for word in re.findall(r'"([\w.-]+)"', table.read_text("utf-8")))
