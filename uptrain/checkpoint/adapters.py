"""Refuse adapters: an adapter alone is not a model, and transformers silently loads one on top of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from uptrain.checkpoint.jsonfile import read_json
from uptrain.checkpoint.weight_files import ORDER
from uptrain.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
"""The file from which transformers loads an adapter, if peft is installed. Source: transformers, `peft_utils`."""

_AUTO_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "AutoModel",
    }
)  # fmt: skip
_ADDED_TO_INPUTS = frozenset(
    (
        "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "PROMPT_TUNING",
        "P_TUNING", "XLORA",
    )
)  # fmt: skip
"""Kinds that peft can't merge: they add tokens or routes and change no weight."""

_SAFE = re.compile(r"[\w./~+@ -]+")


def refuse_adapter(path: Path, names: Collection[str] | None = None) -> None:
    """Refuse a folder with an adapter in it, alone or with a model, and say how to merge it.

    `names` are the files of the repository, where `path` holds only a part of them; None means that it holds all.

    Raises:
        CheckpointError: there is an adapter.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        return
    name = _name(path)
    try:
        config = read_json(path / ADAPTER_CONFIG)
    except CheckpointError:
        config = {}
    kind = str(config.get("peft_type") or "unknown")
    names = [entry.name for entry in path.iterdir()] if names is None else names
    if "config.json" in names and any(weights in names for weights in ORDER):
        raise CheckpointError(
            f"{name} holds an adapter with a model, and transformers loads it on top of the model: {ADAPTER_CONFIG}.",
            f"Move adapter_* to a folder of their own, then {_merge(config, name, name, f'{name}-adapter', kind)} "
            f"Where it is merged into the weights already, or isn't wanted, just remove {ADAPTER_CONFIG}.",
        )
    base = config.get("base_model_name_or_path")
    raise CheckpointError(
        f"{name} is an adapter ({kind}), not a model; its base model is {base or 'not named'}.",
        f"First {_merge(config, name, base, name, kind)} Copy the tokenizer's files there too, and name that folder.",
    )


def _merge(config: Mapping[str, Any], name: str, base: Any, adapter: str, kind: str) -> str:
    """Return a sentence on how to merge; text from a file goes into the command only where a shell can't run it.

    - `config`: adapter_config.json.
    - `name`: the adapter's folder, which gives the merged model its name.
    - `base`: where the base model is.
    - `adapter`: where the adapter will be.
    - `kind`: the adapter's kind.
    """
    if kind in _ADDED_TO_INPUTS:
        return f"use its base model alone: an adapter of kind {kind} can't be merged into weights."
    auto = _AUTO_CLASSES.get(str(config.get("task_type")), "AutoModelForCausalLM")
    merged = _safe(f"{PurePath(name).name}-merged", "NEW")
    return (
        f'merge it: python -c "import peft, transformers as t; '
        f"base = t.{auto}.from_pretrained('{_safe(base, 'BASE')}', dtype='auto'); "
        f"merged = peft.PeftModel.from_pretrained(base, '{_safe(adapter, 'ADAPTER')}').merge_and_unload(); "
        f"merged.save_pretrained('{merged}')\"."
    )


def _safe(value: Any, otherwise: str) -> str:
    return value if isinstance(value, str) and _SAFE.fullmatch(value) else otherwise


def _name(path: Path) -> str:
    """Return what the user called the folder: in the Hub's cache, the repository's id."""
    folder = path.parent.parent.name
    if path.parent.name == "snapshots" and folder.startswith("models--"):
        return folder.removeprefix("models--").replace("--", "/")
    return str(path)
