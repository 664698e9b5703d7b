"""Classes that wrap a language model together with other models, and its place in their configs and files.

A wrapper's checkpoint is described by its language model's config; many of its tensors belong to the other models. A
result gets the wrapper's config again, with the section of the language model changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from uptrain.architectures.decoders import FAMILIES
from uptrain.architectures.model_class import class_named
from uptrain.architectures.schema import Family
from uptrain.architectures.validation import DTYPE_KEYS
from uptrain.errors import UsageError

TIED = "tie_word_embeddings"

BODIES = (
    "language_model.model.", "model.language_model.", "model.text_model.", "language_model.", "text_model.",
)  # fmt: skip
"""How the names of a wrapped body begin: as transformers writes them, as its classes name them, and without a head."""
HEADS = ("lm_head.weight", "language_model.lm_head.weight")

_ABOUT_ALL = ("architectures", "quantization_config", "compression_config", "quantization")
"""Keys of a wrapper's config that apply to the language model too."""
_NOT_THE_SECTION_S = frozenset(("model_type", TIED, *_ABOUT_ALL, *DTYPE_KEYS))
"""Keys that a result never changes in the section, or changes in every section."""


@dataclass(frozen=True)
class Wrapper:
    """A class of transformers that wraps a language model.

    Attributes:
        model_type: the wrapper's model type.
        text: the language model's type, where its section gives none.
        tied: the class's default for `tie_word_embeddings`, which it reads outside the section.
        tied_by_section: whether the class also ties where the section says so.
        both_ways: whether the language model attends in both directions to the tokens before the answer. They are
            cached all the same.
        section: the key under which the config describes the language model.
        auto_class: the Auto class of transformers that loads the wrapper.
        bodies: the prefixes that the language model's body can have.
        heads: the names that its head can have.
    """

    model_type: str
    text: str
    tied: bool = False
    tied_by_section: bool = False
    both_ways: bool = False
    section: str = "text_config"
    auto_class: str = "AutoModelForImageTextToText"
    bodies: tuple[str, ...] = BODIES
    heads: tuple[str, ...] = HEADS


WRAPPERS: Mapping[str, Wrapper] = MappingProxyType(
    {
        entry.model_type: entry
        for entry in (
            Wrapper("aya_vision", "cohere2", tied=True),
            Wrapper("cohere2_vision", "cohere2", tied=True),
            Wrapper("deepseek_vl", "llama", tied=True),
            Wrapper("exaone4_5", "exaone4"),
            Wrapper("gemma3", "gemma3_text", tied=True),
            Wrapper("got_ocr2", "qwen2", tied=True),
            Wrapper("hyperclovax_vision_v2", "hyperclovax", tied=True),
            Wrapper("idefics2", "mistral"),
            Wrapper("idefics3", "llama"),
            Wrapper("internvl", "qwen2", tied=True),
            Wrapper("lighton_ocr", "qwen3", tied=True),
            Wrapper("llava", "llama", tied_by_section=True),
            Wrapper("llava_next", "llama"),
            Wrapper("llava_next_video", "llama", tied_by_section=True),
            Wrapper("llava_onevision", "qwen2", tied_by_section=True),
            Wrapper("mistral3", "mistral", tied=True),
            Wrapper("ovis2", "qwen2", tied=True),
            Wrapper("paligemma", "gemma", tied=True, both_ways=True),
            Wrapper("smolvlm", "llama"),
            Wrapper("video_llava", "llama"),
            Wrapper("video_llama_3", "qwen2", tied_by_section=True),
            Wrapper("vipllava", "llama"),
        )
    }
)


@dataclass(frozen=True)
class Tower:
    """The place of the language model in a wrapper's checkpoint; `whole` is the wrapper's config.json."""

    wrapper: Wrapper
    whole: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """Return the language model's own config, with the keys of the wrapper's config that apply to it."""
        section = self.whole[self.wrapper.section]
        config = {key: value for key, value in section.items() if key not in ("architectures", *DTYPE_KEYS)}
        if self.wrapper.both_ways:
            config.pop("use_bidirectional_attention", None)
        config |= {key: self.whole[key] for key in _ABOUT_ALL if key in self.whole}
        named = self.whole if any(self.whole.get(key) for key in DTYPE_KEYS) else section
        config |= {key: named[key] for key in DTYPE_KEYS if key in named}
        return {**config, "model_type": _text_type(self.wrapper, section), TIED: self._tied(section)}

    def _tied(self, section: Mapping[str, Any]) -> Any:
        said = self.whole.get(TIED, self.wrapper.tied)
        if said or not self.wrapper.tied_by_section:
            return said
        return section.get(TIED, FAMILIES[_text_type(self.wrapper, section)].vocabulary.tied)

    def named(self, family: Family) -> Family:
        """Return the language model's family with the tensor names that it has in the wrapper."""
        return replace(family, prefixes=self.wrapper.bodies)

    def placed(self, family: Family, where: str) -> Family:
        """Return the entry of the language model's family as it is inside the wrapper; `where` names the config.

        It has the wrapper's tensor names. No other class can hold its results, and the wrapper decides what is tied.

        Raises:
            UsageError: the language model's class can't have fewer key/value heads.
        """
        if not family.native or family.targets.get("gqa") or family.keys.latent:
            raise UsageError(
                f"{where} is a {self.wrapper.model_type} around a {family.model_type}, whose class can't have fewer "
                "key/value heads than it has, and no other class fits into the wrapper.",
                "Name a checkpoint that holds the language model alone.",
            )
        return replace(
            self.named(family),
            class_name=class_named(self.whole) or family.class_name,
            auto_class=self.wrapper.auto_class,
            vocabulary=replace(family.vocabulary, heads=self.wrapper.heads, always=False, more=True),
            targets={},
            uncalibrated=f"its layers stand inside a {self.wrapper.model_type}, which can't be run layer by layer yet",
        )

    def around(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the wrapper's config with the section of the language model changed to a result's config."""
        before = self.config
        changed = {key: value for key, value in config.items() if key not in before or before[key] != value}
        section = {key: value for key, value in changed.items() if key not in _NOT_THE_SECTION_S}
        out = {**self.whole, self.wrapper.section: {**self.whole[self.wrapper.section], **section}}
        for dtype in (changed[key] for key in DTYPE_KEYS if key in changed):
            out = _with_dtype({key: _with_dtype(value, dtype) for key, value in out.items()}, dtype)
            out |= {} if any(key in out for key in DTYPE_KEYS) else {"dtype": dtype}
        return out


def tower_in(config: Mapping[str, Any]) -> Tower | None:
    """Return the language model that a config wraps; None if the wrapper or the model's family is unknown."""
    model_type = config.get("model_type")
    wrapper = WRAPPERS.get(model_type) if isinstance(model_type, str) else None
    section = config.get(wrapper.section) if wrapper else None
    if wrapper is None or not isinstance(section, Mapping) or _text_type(wrapper, section) not in FAMILIES:
        return None
    return Tower(wrapper, config)


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the language model in a config.json: the config itself where nothing wraps the model."""
    tower = tower_in(config)
    return config if tower is None else tower.config


def check_unwrapped(config: Mapping[str, Any], name: str, verb: str) -> None:
    """Refuse a wrapper where only a language model is accepted.

    - `config`: the config.json.
    - `name`: what the user called the model.
    - `verb`: what can't be done with a wrapper.

    Raises:
        UsageError: it is a wrapper.
    """
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    if wrapper is not None:
        tower = tower_in(config)
        text = tower.config["model_type"] if tower else "language model"
        raise UsageError(
            f"{name} is a {wrapper.model_type}, which wraps a {text} together with other models, and uptrain can't "
            f"{verb} wrappers yet.",
            f"inspect, convert and load take it as it is, and transformers.{wrapper.auto_class} runs it.",
        )


def _text_type(wrapper: Wrapper, section: Mapping[str, Any]) -> str:
    return str(section.get("model_type") or wrapper.text)


def _with_dtype(value: Any, dtype: str) -> Any:
    """Return a section with its dtype replaced, where it names one."""
    if not isinstance(value, Mapping):
        return value
    return {**value, **{key: dtype for key in DTYPE_KEYS if key in value}}
